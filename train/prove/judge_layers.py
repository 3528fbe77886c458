"""Judges embedding, norms, residual sums, output head and routers."""

from collections.abc import Iterator

import torch
from torch import Tensor

from train.prove import high_precision as high
from train.prove import low_precision as low
from train.prove import reference
from train.prove.bounds import Bound
from train.prove.comparison import BITS
from train.prove.evidence import depth_of, places_of
from train.prove.judge_lora import LoraCall, WeightLora
from train.prove.low_precision import FORMATS, FP32, NearNumbers, Total
from train.prove.step_parts import ELEMENTS, MOST_INCONCLUSIVE, PartCall, StepParts, SumOverCalls

HALF = 2.0**-9
"""Largest relative error of rounding a number to bf16."""
MOST_INCONCLUSIVE_ADAPTED = 0.2
"""Maximum fraction of inconclusive input gradients of a head with LoRA."""
SPLIT = 2.0**-15
"""Relative error of a router's gradient on a GPU."""
NO_GRADIENT = Bound(0.0, "positions that are not learnt have no gradient")


# Norms


def judge_norm(step: StepParts, name: str) -> None:
    """Judge the outputs of a norm."""
    norm_weight = step.weights[f"{name}.weight"]
    for call in step.calls.get(name, []):
        step.compare(
            "norms",
            call,
            "y",
            high.rms_norm(call.rows("x"), norm_weight, _eps(step, name)),
            step.in_rows(len(norm_weight)),
        )


def judge_norm_back(step: StepParts, name: str) -> None:
    """Judge the gradients of a norm's inputs and of its weight."""
    norm_weight, made = step.weights[f"{name}.weight"], SumOverCalls()
    for call in step.calls.get(name, []):
        if call.has("dy"):
            dx, dweight = high.rms_norm_back(call.rows("dy"), call.rows("x"), norm_weight, _eps(step, name))
            if call.has("dx"):
                step.compare("norms", call, "dx", dx, step.in_rows(len(norm_weight)))
            made.add(dweight, step.on_gpu, len(call.rows("dy")))
    step.compare_gradient(f"{name}.weight", made, step.in_rows(made.terms))


def _eps(step: StepParts, name: str) -> float:
    model = step.config.model
    of_latents = name.endswith((".q_norm", ".kv_norm")) and model.latent_norm_eps is not None
    return model.latent_norm_eps if of_latents else model.norm_eps


# Embedding


def judge_embedding(step: StepParts, name: str) -> None:
    """Judge the rows that the embedding returns."""
    for call in step.calls[name]:
        rows = step.weights[f"{name}.weight"][call.tensors["ids"].long()]
        step.compare("embedding", call, "y", Total(rows, rows.abs(), None), BITS)


def judge_embedding_back(step: StepParts, name: str) -> None:
    """Judge the embedding's gradient.

    The row of a token is the fp32 sum of the output gradients at all positions with this token.
    """
    made, table = SumOverCalls(), step.weights[f"{name}.weight"]
    for call in step.calls[name]:
        if call.has("dy"):
            ids, dy_ND = call.tensors["ids"].long().flatten(), call.rows("dy")
            summed, size = (torch.zeros_like(table).index_add_(0, ids, one) for one in (dy_ND, dy_ND.abs()))
            made.add(Total(summed, size, None), False, len(ids))
    step.compare_gradient(f"{name}.weight", made)


# Residual sums: attention and the FFN add their input to their output


def judge_sums(step: StepParts, name: str) -> None:
    """Judge a block's residual sums after attention and after the FFN."""
    ffn = f"{name}.ffn" if f"{name}.ffn.w13" in step.calls else f"{name}.moe"
    for call in step.calls[f"{name}.ffn_norm"]:
        before = next(
            one for one in step.calls[f"{name}.attention_norm"] if (one.rank, one.number) == (call.rank, call.number)
        )
        attention, made, out = (_seen(call, "forward", part) for part in (f"{name}.attention", ffn, name))
        _judge_sum(step, call, f"{name}.attention and its input", call.get("x"), before.get("x"), attention)
        _judge_sum(step, call, name, out, call.get("x"), made)


def judge_sums_back(step: StepParts, name: str) -> None:
    """Judge the gradient at the FFN norm's input, a sum of two gradients."""
    for call in step.calls[f"{name}.ffn_norm"]:
        got, out = (_seen(call, "backward", one) for one in (f"{name}.attention", name))
        _judge_sum(step, call, f"gradients after {name}.attention", got, out, call.get("dx"))


def _judge_sum(step: StepParts, call: PartCall, name: str, got: Tensor, one: Tensor, other: Tensor) -> None:
    one, other = one.flatten(0, -2), other.flatten(0, -2)
    total, bound = Total(one + other, one.abs() + other.abs(), None), Bound(4 * FP32, "one addition and one rounding")
    step.compare("sums past attention and FFN", call, "x", total, bound, got=got, name=name)


def _seen(call: PartCall, phase: str, name: str) -> Tensor:
    """Returns a recorded tensor of the call's micro-batch, in fp64."""
    return call.rank.tensors[f"{phase}/{name}/{call.number}"].double()


# Output head


def judge_head(step: StepParts, name: str) -> None:
    """Judge the losses of main model and MTP depths."""
    bound = Bound(2 * ELEMENTS, "a logarithm and a sum in fp32")
    for call, made, _ in _head_calls(step):
        step.compare("output head", call, "y", made.loss, bound, FORMATS["fp32"])


def judge_head_back(step: StepParts, name: str) -> None:
    """Judge the head's gradients: input states, weight, LoRA A and B."""
    whole, lora, order = SumOverCalls(), WeightLora(step, "head.weight"), step.in_rows(step.config.model.vocab_size)
    for call, made, learnt_N in _head_calls(step):
        if not call.has("dx", "dy"):
            step.at.fail("parts", call.name, "some micro-batches have no backward pass", 0, 1, call.rank)
            continue
        slope, dx_ND, x_ND = call.get("dy"), call.rows("dx"), call.rows("x")
        x, weight = _times(made.x, low.nearest(slope, step.rounding.high)), _times(made.weight, slope)
        twice = low.spacing(
            x.x, step.rounding.high
        )  # the result of the matmul is rounded, and then its product with the slope
        x = Total(x.x, x.size, twice if x.off is None else twice + x.off)
        # The sum over each block of tokens is rounded. A CPU without bf16 instructions also rounds partial sums.
        pieces = 2 * HALF * weight.size if step.rounds_gradients else torch.zeros_like(weight.x)
        weight = weight._replace(off=pieces if weight.off is None else pieces + weight.off)
        if learnt_N is not None:
            rest, quantity = dx_ND[~learnt_N], "gradients of positions that are not learnt"
            step.at.compare(quantity, call.name, rest, torch.zeros_like(rest), NO_GRADIENT, rank=call.rank)
            dx_ND, x_ND = dx_ND[learnt_N], x_ND[learnt_N]
        x = lora.narrow(x, weight, LoraCall(call, "dropped", NearNumbers(x_ND), low.matmul))
        step.compare(
            "output head",
            call,
            "dx",
            x,
            order,
            got=dx_ND,
            most=MOST_INCONCLUSIVE_ADAPTED if lora.names else MOST_INCONCLUSIVE,
        )
        if not step.config.optim.detach_mtp or call.name == "head.0":  # otherwise this depth gives the head no gradient
            whole.add(weight, False, len(x.x))
    lora.judge_gradients(MOST_INCONCLUSIVE_ADAPTED)
    step.compare_gradient("head.weight", whole, step.in_rows(whole.terms))


def _head_calls(step: StepParts) -> Iterator[tuple[PartCall, high.HeadSlopes, Tensor | None]]:
    """Yields the head's calls: (call, expected results, mask of learnt targets)."""
    order, lora = step.in_rows(step.config.model.hidden).value, WeightLora(step, "head.weight")
    for depth in range(1 + step.config.model.mtp_depth):
        seats = reference.Seats.of(step.batch, depth)
        for call in step.calls.get(f"head.{depth}", []):
            rows, info, learnt_N = call.rank.rows(call.number), call.rank.info, None
            places = places_of(info, step.config.seq_len, depth)
            targets_N = step.batch.tokens_BS[rows][:, [place + depth + 1 for place in places]].flatten()
            x_ND, count = call.rows("x"), info.micro_batch_size * step.config.seq_len / step.cp
            if seats.learnt_BT is not None:
                learnt_N = seats.learnt_BT[rows][:, places].flatten()
                main_BT = reference.Seats.of(step.batch, 0).learnt_BT
                assert main_BT is not None
                micro_batches = info.plan["batch_size"] / (
                    info.micro_batch_size * info.dp
                )  # average number of micro-batches on a rank
                x_ND, targets_N = x_ND[learnt_N], targets_N[learnt_N]
                count = int(main_BT.sum()) / (step.shared * micro_batches)
            given = LoraCall(call, "dropped", NearNumbers(x_ND), low.matmul)
            x, weight = lora.widen(given, step.weights["head.weight"])
            yield call, high.head(x, weight, targets_N, count, step.rounding.high, order), learnt_N


def _times(one: Total, factor: Tensor) -> Total:
    return Total(one.x * factor, one.size * factor.abs(), None if one.off is None else one.off * factor.abs())


# Routers: gates, chosen experts and gradients, with the balance loss


def judge_router(step: StepParts, name: str) -> None:
    """Judge the gates, and that the chosen experts have the best scores."""
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
    """Judge the gradients of the router's input and weight."""
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
    if not step.config.optim.freeze_routers:  # a frozen router's gradient is zero, which other comparisons show
        bound = Bound(order.value + step.in_rows(made.terms).value, order.reason)
        step.compare_gradient(f"{name}.weight", made, bound)


def _balance(step: StepParts, call: PartCall, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradient of the balance loss (paper eq. 17-20) for the normalised scores s' (B, T, E), and its
    possible error due to nearly equal scores.
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
            )  # a few roundings of the logit's sum, times the sigmoid's slope of at most 1/4
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
    """Returns a recorded routing tensor of the call's micro-batch, fp64 (B, T, K); None without one.

    - phase: forward or backward.
    - what: ids or gates.
    """
    found = call.rank.tensors.get(f"{phase}/{call.name}.{what}/{call.number}")
    return None if found is None else found.double().view(*call.tensors["x"].shape[:2], -1)
