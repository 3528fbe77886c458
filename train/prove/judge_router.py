"""Judges routers on single ranks: gates, choices, and the gradients of inputs and weights, including the balance
loss."""

import torch
from torch import Tensor

from train.prove import high_precision as high
from train.prove import reference
from train.prove.bounds import Bound
from train.prove.evidence import depth_of, places_of
from train.prove.low_precision import FORMATS, FP32
from train.prove.step_parts import PartCall, StepParts, SumOverCalls

SPLIT = 2.0**-15
"""Relative error of a router's gradient on a GPU, which multiplies it as two bf16 numbers."""


def judge_router(step: StepParts, name: str) -> None:
    """Judge the gates, and the score distance between chosen and better experts."""
    model, weight, order = step.config.model, step.weights[f"{name}.weight"], step.in_rows(step.config.model.hidden)
    for call in step.calls.get(name, []):
        ids_BTK, gates = _routed(call, "forward", "ids"), _routed(call, "forward", "gates")
        assert ids_BTK is not None and gates is not None
        scores_BTE, sizes_BTE = high.route_scores(call.get("x"), weight, model.scores == "softmax")
        total = high.gates(scores_BTE, sizes_BTE, ids_BTK.long(), model.route_scale)
        step.compare("router", call, "gates", total, order, FORMATS["fp32"], got=gates)
        layer = name.removesuffix(".moe.router").removesuffix(".block")
        biased_NE = (scores_BTE + step.biases[layer]).flatten(0, 1)
        excess = high.choice_excess(model, biased_NE, ids_BTK.long().flatten(0, 1))
        bound = Bound(order.value * (1 + sizes_BTE.max().item() / 4), "what rounding in fp32 does to a score")
        step.at.compare("router's choice", name, excess, 0.0, bound, rank=call.rank, scale=1.0)


def judge_router_back(step: StepParts, name: str) -> None:
    """Judge the gradients of the input and of the weight."""
    model, weight, made = step.config.model, step.weights[f"{name}.weight"], SumOverCalls()
    order = step.in_rows(max(model.experts, model.hidden))
    order = Bound(max(order.value, SPLIT), "a product of two parts of bf16") if step.on_gpu else order
    for call in step.calls.get(name, []):
        dgates, ids_BTK = _routed(call, "backward", "gates"), _routed(call, "forward", "ids")
        if dgates is None or ids_BTK is None:
            continue
        x_BTD, ids_BTK, (balance, off) = call.get("x"), ids_BTK.long(), _balance(step, call, weight)
        is_softmax = model.scores == "softmax"
        slopes = high.route_back(dgates, x_BTD, weight, ids_BTK, model.route_scale, balance, off, is_softmax)
        if call.has("dx"):
            step.compare("router", call, "dx", slopes.x, order)
        made.add(slopes.weight, False, ids_BTK[..., 0].numel())
    if not step.config.optim.freeze_routers:  # otherwise its gradient is zero, as other checks show
        bound = Bound(order.value + step.in_rows(made.terms).value, order.reason)
        step.compare_gradient(f"{name}.weight", made, bound)


def _balance(step: StepParts, call: PartCall, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the balance loss (eq. 17-20) for shares of scores, (B, T, E), and their possible change by near ties.

    They are counted over whole sequences, or over each sample in them.
    """
    model, info, depth, config = step.config.model, call.rank.info, depth_of(call.name), step.config
    seats = reference.Seats.of(step.batch, depth)
    often_BTE = torch.zeros(info.micro_batch_size, config.seq_len - depth, model.experts, dtype=torch.float64)
    may_BTE = torch.zeros_like(often_BTE)
    for one in step.calls[call.name]:
        if one.number != call.number or one.rank.info.dp_rank != info.dp_rank:
            continue
        places = places_of(one.rank.info, config.seq_len, depth)
        score_BTE, size_BTE = high.route_scores(one.get("x"), weight, model.scores == "softmax")
        often_BTE[:, places] = high.among_best(score_BTE, model.top_k)
        if model.top_k < model.experts:
            kth, after = score_BTE.sort(-1, descending=True).values[..., model.top_k - 1 : model.top_k + 1].split(1, -1)
            near = (
                2 * FP32 * (1 + size_BTE.amax(-1, keepdim=True))
            )  # some roundings of the sum, and a sigmoid's slope of 1/4
            close = ((score_BTE - kth).abs() <= near) | ((score_BTE - after).abs() <= near)
            may_BTE[:, places] = ((kth - after <= near) & close).double()
    samples_BT, count = torch.zeros(often_BTE.shape[:2]), info.plan["batch_size"]
    if seats.samples_BT is not None:
        samples_BT, count = seats.samples_BT[call.rank.rows(call.number)], seats.samples
    together_BTT = ((samples_BT[:, :, None] == samples_BT[:, None]) & (samples_BT >= 0)[:, None]).double()
    length_BT1 = together_BTT.sum(-1, keepdim=True).clamp_min(1)
    factor_BT1 = config.optim.balance_loss * step.shared / count * model.experts / (model.top_k * length_BT1**2)
    here = places_of(info, config.seq_len, depth)
    often_BTE, may_BTE = ((factor_BT1 * (together_BTT @ one))[:, here] for one in (often_BTE, may_BTE))
    return often_BTE, may_BTE


def _routed(call: PartCall, phase: str, what: str) -> Tensor | None:
    """A routing tensor of the call, (B, T, K), fp64."""
    found = call.rank.tensors.get(f"{phase}/{call.name}.{what}/{call.number}")
    return None if found is None else found.double().view(*call.tensors["x"].shape[:2], -1)
