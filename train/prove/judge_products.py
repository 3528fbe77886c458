"""Linear layers, experts and the SwiGLU between their products: forward and backward of single ranks, and the gradients of their weights."""

from collections.abc import Iterator

import torch

from train.prove import low_precision as low
from train.prove.low_precision import FORMATS, LinearRules, NearNumbers, Total
from train.prove.step_parts import IN_ELEMENTS, PartCall, StepParts, SumOverCalls


def judge_linear(step: StepParts, name: str) -> None:
    """Outputs."""
    rules, whole = _rules(step, name), step.weights[f"{name}.weight"]
    weight = low.weight_for("fprop", whole, rules)
    for call in step.calls.get(name, []):
        step.compare("products", call, "y", low.fprop(call.rows("x"), weight, rules), step.order(whole.size(-1)))


def judge_linear_back(step: StepParts, name: str) -> None:
    """Gradients of inputs and of the weight."""
    rules, whole, made = _rules(step, name), step.weights[f"{name}.weight"], SumOverCalls()
    weight = low.weight_for("dgrad", whole, rules)
    for call in step.calls.get(name, []):
        if not call.has("dy"):
            continue
        dy_TN = NearNumbers(call.rows("dy"))
        if call.has("dx"):
            step.compare("products", call, "dx", low.dgrad(dy_TN, weight, rules), step.order(len(whole)))
        total = low.wgrad(dy_TN, low.kept(call.rows("x"), rules.kept), rules)
        made.add(total, _rounds_gradients(step), len(dy_TN.x))
    step.compare_gradient(f"{name}.weight", made)


def _rules(step: StepParts, name: str) -> LinearRules:
    return step.rounding.output if name.endswith(".attention.out") else step.rounding.dense


def _rounds_gradients(step: StepParts) -> bool:
    """Whether that is so of products that a recipe may have in FP8."""
    return step.rounds_gradients and not step.rounding.is_fp8


# SwiGLU of dense layers and shared experts


def judge_swiglu(step: StepParts, name: str) -> None:
    """Inputs of the second product."""
    for first, second in _pairs(step, name):
        a_NF = low.swiglu(first.rows("y"), None)
        step.compare("SwiGLU", second, "x", Total(a_NF, a_NF.abs(), None), IN_ELEMENTS)


def judge_swiglu_back(step: StepParts, name: str) -> None:
    """Gradients of the first product."""
    for first, second in _pairs(step, name):
        if second.has("dx") and first.has("dy"):
            da_NF = NearNumbers(second.rows("dx"))
            back = low.swiglu_backward(NearNumbers(first.rows("y")), None, da_NF, step.rounding.high)
            step.compare("SwiGLU", first, "dy", back.dh, IN_ELEMENTS)


def _pairs(step: StepParts, name: str) -> Iterator[tuple[PartCall, PartCall]]:
    """Calls of both products of the same rows."""
    seconds = {(call.rank.info.rank, call.number): call for call in step.calls.get(f"{name}.w2", [])}
    for call in step.calls.get(f"{name}.w13", []):
        yield call, seconds[call.rank.info.rank, call.number]


# Experts


def judge_experts(step: StepParts, name: str) -> None:
    """Both products."""
    up, down, high = step.rounding.up, step.rounding.down, step.rounding.high
    w13 = low.weight_for("fprop", step.weights[f"{name}.experts.w13"], up)
    w2 = low.weight_for("fprop", step.weights[f"{name}.experts.w2"], down)
    for call in step.calls.get(name, []):
        counts, here = _here(call)
        x_RD = low.cast_rows(NearNumbers(call.get("x")), counts, up.fprop[0], -1)
        h_R2F = _by_expert(x_RD, counts, w13, here)
        step.compare("products of experts", call, "h", h_R2F, step.order(w13.x.size(-1)))
        a_RF = low.swiglu(call.get("h"), call.get("gates"))
        if down.fprop[0] is None:
            a = low.rounded(NearNumbers(a_RF), high, low.CURVED * a_RF.abs())
        else:
            a = low.cast_rows(NearNumbers(a_RF), counts, down.fprop[0], -1, low.CURVED)
        step.compare("products of experts", call, "y", _by_expert(a, counts, w2, here), step.order(w2.x.size(-1)))


def judge_experts_back(step: StepParts, name: str) -> None:
    """Gradients of rows, of the first product, of gates and of both weights."""
    up, down, high = step.rounding.up, step.rounding.down, step.rounding.high
    whole13, whole2 = (step.weights[f"{name}.experts.{part}"] for part in ("w13", "w2"))
    w13, w2 = low.turned(low.weight_for("dgrad", whole13, up)), low.turned(low.weight_for("dgrad", whole2, down))
    made13, made2 = SumOverCalls(), SumOverCalls()
    for call in step.calls.get(name, []):
        if not call.has("dy", "dh"):
            continue
        counts, here = _here(call)
        dy_RD = low.cast_rows(NearNumbers(call.get("dy")), counts, down.dgrad[0], -1)
        da_RF = _by_expert(dy_RD, counts, w2, here)
        da = low.rounded(da_RF, high, step.order(w2.x.size(-1)).value * da_RF.size)
        h = low.cast_rows(NearNumbers(call.get("h")), counts, step.rounding.swiglu, -1)
        back = low.swiglu_backward(h, call.get("gates"), da, high)
        step.compare("SwiGLU of experts", call, "dh", back.dh, IN_ELEMENTS)
        if call.has("dgates"):
            order = step.order(da.x.size(-1))
            step.compare("SwiGLU of experts", call, "dgates", back.dgates, order, FORMATS["fp32"])
        dh = NearNumbers(call.get("dh"))
        if call.has("dx"):
            dx_RD = _by_expert(low.cast_rows(dh, counts, up.dgrad[0], -1), counts, w13, here)
            step.compare("products of experts", call, "dx", dx_RD, step.order(w13.x.size(-1)))
        x = low.cast_rows(NearNumbers(call.get("x")), counts, up.kept, -1)
        for made, rules, whole, sides in ((made13, up, whole13, (dh, x)), (made2, down, whole2, (dy_RD, back.a))):
            left, right = (low.cast_rows(one, counts, rule, -2) for one, rule in zip(sides, rules.wgrad, strict=True))
            made.add_rows(left, right, counts, here, whole, _rounds_gradients(step))
    step.compare_gradient(f"{name}.experts.w2", made2)
    step.compare_gradient(f"{name}.experts.w13", made13)


def _here(call: PartCall) -> tuple[list[int], range]:
    """Rows of each expert that the rank has, and which ones of all these are."""
    counts, first = call.tensors["counts"].tolist(), int(call.tensors["first"])
    return counts, range(first, first + len(counts))


def _by_expert(rows: NearNumbers, counts: list[int], weight: NearNumbers, here: range) -> Total:
    """Rows of each expert times its own matrix. weight: (E, N, C), of all experts."""
    empty = rows.x.new_zeros(0, weight.x.size(1))
    parts = [Total(empty, empty, empty)]
    for expert, one in zip(here, low.split_rows(rows, counts), strict=True):
        if len(one.x):
            off = None if weight.off is None else weight.off[expert]
            made = low.product(one, NearNumbers(weight.x[expert], off))
            parts.append(made._replace(off=torch.zeros_like(made.x) if made.off is None else made.off))
    return Total(*map(torch.cat, zip(*parts, strict=True)))
