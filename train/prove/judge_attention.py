"""Compares each rank's attention with the reference, including the rotation of queries and keys.

With context parallelism, a rank records no keys and values. The judge recomputes them from the recorded outputs of the
linear layers.

Shapes: as in train/prove/reference.py; L positions of a complete sequence, T positions of a rank.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.prove import high_precision as high
from train.prove import low_precision as low
from train.prove.bounds import Bound
from train.prove.evidence import Evidence, depth_of, places_of
from train.prove.low_precision import FORMATS, Total
from train.prove.step_parts import ELEMENTS, PartCall, StepParts

SCORES = 4 * 2.0**-9
"""Relative error of attention in bf16: four roundings of at most 2^-9."""


OVERFLOW = 88.8
"""The fp32 exponential of any larger number is infinite."""


@dataclass(frozen=True)
class AttentionCall:
    """Attention of one micro-batch on one rank."""

    call: PartCall
    """The call that recorded attention's output."""
    what: str
    """Name under which the call recorded the output of attention."""
    out: PartCall | None
    """Call of the output projection; None if it got no gradient."""
    q: Tensor
    k: Tensor
    v: Tensor
    unseen: Tensor
    places: Sequence[int]
    """Positions of the queries."""

    def heads(self, tensor: Tensor) -> Tensor:
        """Splits a tensor (B, T, H * X) into heads: (B, H, T, X)."""
        return tensor if tensor.dim() == 4 else tensor.unflatten(-1, (self.q.size(1), -1)).transpose(1, 2)


def judge_attention(step: StepParts, name: str) -> None:
    """Judge attention's outputs and, for complete sequences, the rotations."""
    scale, shared = high.softmax_scale(step.config), step.cp > 1
    for one in _shared_calls(step, name) if shared else _whole_calls(step, name):
        total, got = high.attend(one.q, one.k, one.v, scale, one.unseen), one.heads(one.call.get(one.what))
        step.compare("attention", one.call, one.what, total, _in_scores(step), got=got)
        most_BHT = (one.q @ one.k.mT * scale).masked_fill(one.unseen, -math.inf).amax(-1)
        step.at.acted(
            "scores beyond an exponential in fp32, queries", int((most_BHT > OVERFLOW).sum()), most_BHT.numel()
        )
        if not shared:
            _judge_heads(step, name, one)


def judge_attention_back(step: StepParts, name: str) -> None:
    """Judge the gradients of queries, keys and values that attention computes."""
    scale, shared = high.softmax_scale(step.config), step.cp > 1
    for one in _shared_calls(step, name) if shared else _whole_calls(step, name):
        dout = "dx" if shared else "dy"
        if one.out is None or not one.call.has(dout):
            continue
        # Attention's output is saved only once, as the output projection's input. Attention's backward reads this
        # tensor (paper 3.3.3).
        kept = low.kept(one.out.rows("x"), step.rounding.output.kept).x.view(one.out.tensors["x"].shape)
        slopes = high.attend_back(
            one.heads(one.call.get(dout)), one.q, one.k, one.v, _heads_of(kept, one.q.size(1)), scale, one.unseen
        )
        if shared:
            _judge_shared_slopes(step, name, one, slopes)
            continue
        for what, total in zip(("dq", "dk", "dv"), slopes, strict=True):
            step.compare("attention", one.call, what, total, _in_scores(step))


def _in_scores(step: StepParts) -> Bound:
    if step.rounding.high == FORMATS["fp32"]:
        return step.in_rows(step.config.seq_len)
    return Bound(SCORES, "4 x 2^-9: probabilities and their gradients may be rounded to bf16, each by 2^-9 relative")


def _queries(step: StepParts, name: str) -> str:
    return f"{name}.{'q' if step.config.model.q_rank is None else 'q_up'}"


def _unseen(step: StepParts, rank: Evidence, number: int, length: int) -> Tensor:
    documents = step.batch.documents_BS
    return high.unseen(length, None if documents is None else documents[rank.rows(number), :length])


def _heads_of(x_BTX: Tensor, heads: int) -> Tensor:
    """Splits a tensor (B, T, H * X) into heads: (B, H, T, X)."""
    return x_BTX.unflatten(-1, (heads, -1)).transpose(1, 2)


# Ranks that have complete sequences


def _whole_calls(step: StepParts, name: str) -> Iterator[AttentionCall]:
    for call in step.calls.get(name, []):
        q, k, v = (call.get(what) for what in "qkv")
        unseen, is_back = _unseen(step, call.rank, call.number, q.size(2)), call.has("dy", "dq", "dk", "dv")
        out = step.through(f"{name}.out", call.rank)[call.number] if is_back else None
        yield AttentionCall(call, "y", out, q, k, v, unseen, range(q.size(2)))


def _judge_heads(step: StepParts, name: str, one: AttentionCall) -> None:
    """Judge queries, keys and values, with their rotation."""
    model, call = step.config.model, one.call
    q_BTX, kv_BTX, down_BTX = (
        step.through(part, call.rank)[call.number].get("y")
        for part in (_queries(step, name), f"{name}.kv_up", f"{name}.kv_down")
    )
    q_BHTQ, kv_BHTX = (_heads_of(each, model.heads) for each in (q_BTX, kv_BTX))
    q_BHTQ, nope = _grown(step, q_BHTQ, one.places), model.nope_head_dim
    rope = down_BTX[..., model.kv_rank :].unsqueeze(1).expand(-1, model.heads, -1, -1)
    bound = Bound(8 * ELEMENTS, "angles and rotations in fp32, and one rounding of the result")
    rotated_q, rotated_k = (high.rotated(part, step.config, one.places) for part in (q_BHTQ[..., nope:], rope))
    for what, got, want in (
        ("q", one.q[..., nope:], rotated_q),
        ("q", one.q[..., :nope], q_BHTQ[..., :nope]),
        ("k", one.k[..., nope:], rotated_k),
        ("k", one.k[..., :nope], kv_BHTX[..., :nope]),
        ("v", one.v, kv_BHTX[..., nope:]),
    ):
        total = want if isinstance(want, Total) else Total(want, want.abs(), None)
        step.compare("heads", call, what, total, bound, got=got)


def _grown(step: StepParts, q_BHTQ: Tensor, places: Sequence[int]) -> Tensor:
    """Returns the queries before the rotation, multiplied by yarn.query_growth's factors."""
    if not step.config.model.yarn.query_growth:
        return q_BHTQ
    return low.nearest(q_BHTQ * high.query_sizes(step.config, places), step.rounding.high)


# Ranks that share sequences (context parallelism)


def _shared_calls(step: StepParts, name: str) -> Iterator[AttentionCall]:
    """Yields one call of attention per micro-batch and rank."""
    model, high_format, depth = step.config.model, step.rounding.high, depth_of(name)
    heads, nope, length = model.heads, model.nope_head_dim, step.config.seq_len - depth
    for rank in step.ranks:
        places = places_of(rank.info, step.config.seq_len, depth)
        for number, out in enumerate(step.through(f"{name}.out", rank)):
            kv_BHLX = _heads_of(torch.cat([one.get("y") for one in _blocks(step, name, rank, number)], 1), heads)
            rope_BHLR = _rope_keys(step, name, rank, number, length).unsqueeze(1).expand(-1, heads, -1, -1)
            queries = step.through(_queries(step, name), rank)[number].get("y")
            q_BHTQ = _grown(step, _heads_of(queries, heads), places)
            rope = low.nearest(high.rotated(q_BHTQ[..., nope:], step.config, places).x, high_format)
            q_BHTQ, k_BHLQ = (
                torch.cat(each, -1) for each in ([q_BHTQ[..., :nope], rope], [kv_BHLX[..., :nope], rope_BHLR])
            )
            unseen = _unseen(step, rank, number, length)[:, :, places]
            yield AttentionCall(out, "x", out, q_BHTQ, k_BHLQ, kv_BHLX[..., nope:], unseen, places)


def _blocks(step: StepParts, name: str, rank: Evidence, number: int) -> list[PartCall]:
    """Returns the calls of kv_up in a micro-batch, one per block of the sequence."""
    blocks, calls = 2 * step.cp, step.through(f"{name}.kv_up", rank, back=False)
    if f"{name}.indexer.q" in step.calls:  # the indexer's loss repeats these calls
        calls = [one for at, one in enumerate(calls) if not any(_is_same(one, other) for other in calls[:at])]
    return calls[number * blocks : (number + 1) * blocks]


def _is_same(one: PartCall, other: PartCall) -> bool:
    return torch.equal(one.tensors["x"], other.tensors["x"])


def _rope_keys(step: StepParts, name: str, rank: Evidence, number: int, length: int) -> Tensor:
    """Returns the rotated rope keys of all positions, (B, L, R)."""
    whole = None
    for mate in (mate for mate in step.ranks if mate.info.dp_rank == rank.info.dp_rank):
        if calls := step.through(f"{name}.kv_down", mate):
            rope_BTR = calls[number].get("y")[..., step.config.model.kv_rank :]
            places = places_of(mate.info, step.config.seq_len, depth_of(name))
            made = low.nearest(high.rotated(rope_BTR, step.config, places).x, step.rounding.high)
            whole = made.new_zeros(len(made), length, made.size(-1)) if whole is None else whole
            whole[:, places] = made
    assert whole is not None, f"no rank has {name}"
    return whole


def _judge_shared_slopes(step: StepParts, name: str, one: AttentionCall, slopes: high.AttentionSlopes) -> None:
    """Judge the gradients of a rank's queries, and the rank's contributions to gradients of keys and values."""
    nope, heads, rank, bound = step.config.model.nope_head_dim, one.q.size(1), one.call.rank, _in_scores(step)
    grown = high.query_sizes(step.config, one.places)
    dq, size, off = slopes.q.x * grown, slopes.q.size * grown, low.slack(slopes.q) * grown
    number = step.through(f"{name}.out", rank).index(one.call)
    queries = step.through(_queries(step, name), rank)[number]
    got = _heads_of(queries.get("dy"), heads)
    step.compare(
        "attention", queries, "dy", Total(*(each[..., :nope] for each in (dq, size, off))), bound, got=got[..., :nope]
    )
    rotated = high.rotated(dq[..., nope:], step.config, one.places, back=True)
    size, off = (high.rotated(each[..., nope:], step.config, one.places).size for each in (size, off))
    rotated = rotated._replace(size=size, off=off)
    step.compare("attention", queries, "dy", rotated, bound, got=got[..., nope:])
    first = 0
    for block in _blocks(step, name, rank, number):
        rows = slice(first, first + block.get("x").size(1))
        first = rows.stop
        for again in step.through(f"{name}.kv_up", rank):
            if _is_same(again, block):
                got = _heads_of(again.get("dy"), heads)
                for have, total, part in (
                    (got[..., :nope], slopes.k, slice(nope)),
                    (got[..., nope:], slopes.v, slice(None)),
                ):
                    want = Total(*(each[:, :, rows, part] for each in (total.x, total.size, low.slack(total))))
                    step.compare("attention", again, "dy", want, bound, got=have)
