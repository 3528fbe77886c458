"""Computes the router's expert choice with Triton kernels.

The results differ from train/kernels/plain/routing.py only in the order of sums over experts and tokens.

    forward     scores, choice, gate values; and for each block of tokens the sums that the router's counters need
    finish      adds these sums to the router's counters, in the order of the tokens, without atomic additions
    backward    the gradient of the logits

The module needs triton. Shapes as in train/kernels/plain/routing.py; EXPERTS, GROUPS and CHOSEN are E, G and K rounded
up to powers of two.
"""

import triton
import triton.language as tl
from torch import Tensor

from parallel.triton_types import constexpr, power_of_2_from, quick
from train.model.operations import RouterCounters, RoutingRule

ROUTE_TOKENS = 8
"""Number of tokens of one sequence that a program processes."""
SUM_BLOCKS = 16
"""Number of token blocks whose sums one iteration of the loop adds."""


@triton.jit
def _largest(values, last: constexpr):
    """Returns the index of the largest value along the last axis. Of equal values, the lower index wins. With NaN, the
    index is at most `last`.
    """
    return tl.minimum(tl.argmax(values, axis=1, tie_break_left=True), last)[:, None]


@triton.jit
def _open_groups(
    biased, expert, per_group,
    GROUPS_G: constexpr, top_groups: constexpr, group_top_k: constexpr, GROUPS: constexpr,
):  # fmt: skip
    """Returns whether each expert's group is one of the top_groups, by the sum of its group_top_k best scores."""
    tokens: constexpr = biased.shape[0]
    group, numbers = expert // per_group, tl.arange(0, GROUPS)[None, :]
    sums = tl.full((tokens, GROUPS), -float("inf"), tl.float32)
    for g in range(GROUPS_G):
        inside = tl.where(group == g, biased, -float("inf"))
        total = tl.zeros((tokens, 1), tl.float32)
        for _ in range(group_top_k):
            total += tl.max(inside, axis=1, keep_dims=True)
            inside = tl.where(expert == tl.argmax(inside, axis=1, tie_break_left=True)[:, None], -float("inf"), inside)
        sums = tl.where(numbers == g, total, sums)
    opened = tl.zeros(biased.shape, tl.int1)
    for _ in range(top_groups):
        best = _largest(sums, GROUPS_G - 1)
        opened = opened | (group == best)
        sums = tl.where(numbers == best, -float("inf"), sums)
    return opened


@quick
@triton.jit
def _route_kernel(
    logits_ptr, bias_ptr, scores_ptr, ids_ptr, gates_ptr, factor_ptr, total_ptr, load_ptr, share_ptr, often_ptr,
    length, per_group, route_scale,
    E: constexpr, K: constexpr, GROUPS_G: constexpr, top_groups: constexpr, group_top_k: constexpr,
    given: constexpr, counted: constexpr, balanced: constexpr,
    EXPERTS: constexpr, GROUPS: constexpr, CHOSEN: constexpr, ROUTE_TOKENS: constexpr,
):  # fmt: skip
    """Computes scores, choice and gate values of ROUTE_TOKENS tokens. given: whether the ids are an input."""
    batch = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * ROUTE_TOKENS + tl.arange(0, ROUTE_TOKENS)[:, None]
    expert, entry = tl.arange(0, EXPERTS)[None, :], tl.arange(0, CHOSEN)[None, :]
    token, real = batch * length + tokens, tokens < length
    there = real & (expert < E)
    logits = tl.load(logits_ptr + token * E + expert, there, 0.0)
    scores = tl.where(there, tl.div_rn(1.0, 1.0 + tl.exp(-logits)), 0.0)
    tl.store(scores_ptr + token * E + expert, scores, there)
    left = tl.where(expert < E, scores + tl.load(bias_ptr + expert, expert < E, 0.0), -float("inf"))
    if top_groups < GROUPS_G and not given:
        opened = _open_groups(left, expert, per_group, GROUPS_G, top_groups, group_top_k, GROUPS)
        left = tl.where(opened, left, -float("inf"))
    ids = tl.zeros((ROUTE_TOKENS, CHOSEN), tl.int32)
    chosen = tl.zeros((ROUTE_TOKENS, CHOSEN), tl.float32)
    hits = tl.zeros((ROUTE_TOKENS, EXPERTS), tl.int32)
    for k in range(K):
        best = tl.load(ids_ptr + token * K + k, real, 0).to(tl.int32) if given else _largest(left, E - 1)
        taken = expert == best
        left = tl.where(taken, -float("inf"), left)
        ids = tl.where(entry == k, best, ids)
        chosen = tl.where(entry == k, tl.sum(tl.where(taken, scores, 0.0), axis=1, keep_dims=True), chosen)
        hits += (taken & real).to(tl.int32)
    factor = tl.div_rn(
        route_scale + tl.zeros((ROUTE_TOKENS, 1), tl.float32), tl.sum(chosen, axis=1, keep_dims=True) + 1e-20
    )
    written = real & (entry < K)
    if not given:
        tl.store(ids_ptr + token * K + entry, ids.to(tl.int64), written)
    tl.store(gates_ptr + token * K + entry, chosen * factor, written)
    tl.store(factor_ptr + token, factor, real)
    if counted:
        place = (batch * tl.num_programs(0) + tl.program_id(0)) * E + tl.arange(0, EXPERTS)
        inside = tl.arange(0, EXPERTS) < E
        total = tl.sum(scores, axis=1, keep_dims=True)
        tl.store(total_ptr + token, total, real)
        tl.store(load_ptr + place, tl.sum(hits, axis=0), inside)
        share = tl.where(real, scores * tl.div_rn(1.0, tl.where(real, total, 1.0)), 0.0)
        tl.store(share_ptr + place, tl.sum(share, axis=0), inside)
        if balanced:
            left, hits = tl.where(expert < E, scores, -float("inf")), tl.zeros((ROUTE_TOKENS, EXPERTS), tl.int32)
            for _ in range(K):
                taken = expert == _largest(left, E - 1)
                left = tl.where(taken, -float("inf"), left)
                hits += (taken & real).to(tl.int32)
            tl.store(often_ptr + place, tl.sum(hits, axis=0), inside)


@quick
@triton.jit
def _finish_kernel(
    load_ptr, share_ptr, often_ptr, load_E_ptr, score_E_ptr, balance_ptr, frequency_ptr, batch, length, blocks, weight,
    E: constexpr, K: constexpr, added: constexpr, balanced: constexpr, EXPERTS: constexpr, SUM_BLOCKS: constexpr,
):  # fmt: skip
    expert = tl.arange(0, EXPERTS)
    inside = expert < E
    load, score, loss = tl.zeros((EXPERTS,), tl.int64), tl.zeros((EXPERTS,), tl.float32), 0.0
    for b in range(batch):
        share, often = tl.zeros((EXPERTS,), tl.float32), tl.zeros((EXPERTS,), tl.int32)
        for start in range(0, blocks, SUM_BLOCKS):
            block = start + tl.arange(0, SUM_BLOCKS)[:, None]
            place, there = (b * blocks + block) * E + expert[None, :], (block < blocks) & inside[None, :]
            load += tl.sum(tl.load(load_ptr + place, there, 0), axis=0)
            share += tl.sum(tl.load(share_ptr + place, there, 0.0), axis=0)
            if balanced:
                often += tl.sum(tl.load(often_ptr + place, there, 0), axis=0)
        share = share / length
        score += share
        if balanced:
            frequency = often.to(tl.float32) * (E / (K * length.to(tl.float32)))
            tl.store(frequency_ptr + b * E + expert, frequency, inside)
            loss += (frequency * share).sum(axis=0)
    if added:
        tl.store(load_E_ptr + expert, tl.load(load_E_ptr + expert, inside, 0) + load, inside)
        tl.store(score_E_ptr + expert, tl.load(score_E_ptr + expert, inside, 0.0) + score, inside)
        if balanced:
            tl.store(balance_ptr, tl.load(balance_ptr) + weight * loss / batch)


@quick
@triton.jit
def _backward_kernel(
    grad_ptr, scores_ptr, ids_ptr, gates_ptr, factor_ptr, total_ptr, frequency_ptr, dlogits_ptr, length, route_scale, weight,
    E: constexpr, K: constexpr, balanced: constexpr,
    EXPERTS: constexpr, CHOSEN: constexpr, ROUTE_TOKENS: constexpr,
):  # fmt: skip
    """Computes the gradient of the logits. weight: weight of the balance loss per token."""
    batch = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * ROUTE_TOKENS + tl.arange(0, ROUTE_TOKENS)[:, None]
    expert, entry = tl.arange(0, EXPERTS)[None, :], tl.arange(0, CHOSEN)[None, :]
    token, real = batch * length + tokens, tokens < length
    there, written = real & (expert < E), real & (entry < K)
    grads = tl.load(grad_ptr + token * K + entry, written, 0.0)
    gates = tl.load(gates_ptr + token * K + entry, written, 0.0)
    inner = tl.sum(grads * gates, axis=1, keep_dims=True) / route_scale
    factor = tl.load(factor_ptr + token, real, 0.0)
    scores = tl.load(scores_ptr + token * E + expert, there, 0.0)
    dscores = tl.zeros((ROUTE_TOKENS, EXPERTS), tl.float32)
    if balanced:
        frequency = tl.load(frequency_ptr + batch * E + expert, expert < E, 0.0)
        total = tl.load(total_ptr + token, real, 1.0)
        mean = tl.sum(scores * frequency, axis=1, keep_dims=True) / total
        dscores = (frequency - mean) * (weight / total)
    for k in range(K):
        id = tl.load(ids_ptr + token * K + k, real, -1)
        dchosen = (tl.load(grad_ptr + token * K + k, real, 0.0) - inner) * factor
        dscores += tl.where(expert == id, dchosen, 0.0)
    tl.store(dlogits_ptr + token * E + expert, dscores * (1.0 - scores) * scores, there)


def route(
    logits_BTE: Tensor,
    bias_E: Tensor,
    rule: RoutingRule,
    made: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    sums: tuple[Tensor, Tensor, Tensor] | None,
    given: bool,
    balanced: bool,
) -> None:
    """Run the forward kernel.

    made: scores, ids, gates, factor and total, which the kernel writes; if `given`, the ids are an input.
    sums: None, or three tensors (B, blocks, E) with sums over each block of ROUTE_TOKENS tokens: each expert's number
        of tokens, its normalised scores, and how often its unbiased score is among the largest.
    """
    B, T, E = logits_BTE.shape
    _route_kernel[(-(-T // ROUTE_TOKENS), B)](
        logits_BTE, bias_E, *made, *(sums or (made[0], made[0], made[0])), T, E // rule.groups, rule.route_scale,
        E, rule.top_k, rule.groups, rule.top_groups, rule.group_top_k, given, sums is not None, balanced,
        power_of_2_from(E), power_of_2_from(rule.groups), power_of_2_from(rule.top_k), ROUTE_TOKENS,
    )  # fmt: skip


def finish_route(
    sums: tuple[Tensor, Tensor, Tensor],
    counters: RouterCounters,
    frequency_BE: Tensor,
    rule: RoutingRule,
    length: int,
    weight: float,
    added: bool,
) -> None:
    """Add up the sums of all blocks. With a balance loss, also compute how often each expert has one of the largest
    scores.

    added: whether to add the totals to the router's counters.
    """
    B, blocks, E = sums[0].shape
    _finish_kernel[(1,)](
        *sums, *counters, frequency_BE, B, length, blocks, weight,
        E, rule.top_k, added, bool(weight), power_of_2_from(E), SUM_BLOCKS,
    )  # fmt: skip


def route_backward(
    grad_BTK: Tensor,
    kept: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    dlogits_BTE: Tensor,
    rule: RoutingRule,
    weight: float,
) -> None:
    """Run the backward kernel. kept: scores, ids, gates, factor, total, frequency."""
    B, T, E = dlogits_BTE.shape
    _backward_kernel[(-(-T // ROUTE_TOKENS), B)](
        grad_BTK, *kept, dlogits_BTE, T, rule.route_scale, weight / (B * T),
        E, rule.top_k, bool(weight), power_of_2_from(E), power_of_2_from(rule.top_k), ROUTE_TOKENS,
    )  # fmt: skip
