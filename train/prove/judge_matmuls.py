"""Judges linear layers, experts and SwiGLU: forward, backward, weight gradients."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from train.prove import low_precision as low
from train.prove.bounds import Bound
from train.prove.judge_lora import LoraCall, RowMatmul, WeightLora
from train.prove.low_precision import FORMATS, LinearRules, NearNumbers, PlainFormat, Total
from train.prove.step_parts import IN_ELEMENTS, PartCall, StepParts, SumOverCalls


def judge_linear(step: StepParts, name: str) -> None:
    """Judge the outputs of a linear layer."""
    rules, whole, lora = _rules(step, name), step.weights[f"{name}.weight"], WeightLora(step, f"{name}.weight")
    weight = low.weight_for("fprop", whole, rules)
    for call in step.calls.get(name, []):
        total = lora.add(low.fprop(call.rows("x"), weight, rules), _with_lora(call))
        step.compare("matmuls", call, "y", total, step.order(whole.size(-1)))


def judge_linear_back(step: StepParts, name: str) -> None:
    """Judge the gradients of inputs, weight, and LoRA A and B."""
    rules, whole, lora = _rules(step, name), step.weights[f"{name}.weight"], WeightLora(step, f"{name}.weight")
    weight, made = low.weight_for("dgrad", whole, rules), SumOverCalls()
    for call in step.calls.get(name, []):
        if not call.has("dy"):
            continue
        dy_TN = NearNumbers(call.rows("dy"))
        total = low.dgrad(dy_TN, weight, rules)
        if lora.names:
            total = lora.add_back(total, dy_TN, _with_lora(call), partial(_add, step))
        if call.has("dx"):
            step.compare("matmuls", call, "dx", total, step.order(len(whole)))
        if f"{name}.weight" in step.trained:
            wgrad = low.wgrad(dy_TN, low.kept(call.rows("x"), rules.kept), rules)
            made.add(wgrad, _rounds_gradients(step), len(dy_TN.x))
    lora.judge_gradients()
    step.compare_gradient(f"{name}.weight", made)


def _with_lora(call: PartCall) -> LoraCall:
    return LoraCall(call, "dropped", NearNumbers(call.rows("x")), low.matmul)


def _add(step: StepParts, made: SumOverCalls, dy: NearNumbers, x: NearNumbers) -> None:
    """Add one call to the gradient of LoRA A or B."""
    made.add(low.matmul(low.transposed(dy), low.transposed(x)), step.rounds_gradients, len(x.x))


def _rules(step: StepParts, name: str) -> LinearRules:
    return step.rounding.output if name.endswith(".attention.out") else step.rounding.dense


def _rounds_gradients(step: StepParts) -> bool:
    """Returns whether a micro-batch's weight gradient may be rounded to bf16."""
    return step.rounds_gradients and not step.rounding.is_fp8


# SwiGLU of dense layers and shared experts


def judge_swiglu(step: StepParts, name: str) -> None:
    """Judge SwiGLU's outputs, which are the second linear layer's inputs."""
    for first, second in _swiglu_calls(step, name):
        a_NF = low.swiglu(first.rows("y"), None)
        step.compare("SwiGLU", second, "x", Total(a_NF, a_NF.abs(), None), IN_ELEMENTS)


def judge_swiglu_back(step: StepParts, name: str) -> None:
    """Judge the gradients of SwiGLU's input."""
    for first, second in _swiglu_calls(step, name):
        if second.has("dx") and first.has("dy"):
            da_NF = NearNumbers(second.rows("dx"))
            back = low.swiglu_backward(NearNumbers(first.rows("y")), None, da_NF, step.rounding.high)
            step.compare("SwiGLU", first, "dy", back.dh, IN_ELEMENTS)


def _swiglu_calls(step: StepParts, name: str) -> Iterator[tuple[PartCall, PartCall]]:
    """Yields the calls of an FFN's two linear layers, as pairs."""
    seconds = {(call.rank.info.rank, call.number): call for call in step.calls.get(f"{name}.w2", [])}
    for call in step.calls.get(f"{name}.w13", []):
        yield call, seconds[call.rank.info.rank, call.number]


# Experts


def judge_experts(step: StepParts, name: str) -> None:
    """Judge both matmuls of the experts."""
    up, down = step.rounding.up, step.rounding.down
    (whole13, lora13), (whole2, lora2) = _sides(step, name)
    w13, w2 = low.weight_for("fprop", whole13, up), low.weight_for("fprop", whole2, down)
    for call in step.calls.get(name, []):
        counts, times, x = _rows(call), _times(call), NearNumbers(call.get("x"))
        h_R2F = times(low.cast_rows(x, counts, up.fprop[0], -1), w13)
        h_R2F = lora13.add(h_R2F, LoraCall(call, "dropped", x, times))
        step.compare("matmuls of experts", call, "h", h_R2F, step.order(whole13.size(-1)))
        a_RF = low.swiglu(call.get("h"), call.get("gates"))
        a = rounded = low.rounded(NearNumbers(a_RF), step.rounding.high, low.CURVED * a_RF.abs())
        if down.fprop[0] is not None:
            a = low.cast_rows(NearNumbers(a_RF), counts, down.fprop[0], -1, low.CURVED)
        y_RD = lora2.add(times(a, w2), LoraCall(call, "dropped_a", rounded, times))
        step.compare("matmuls of experts", call, "y", y_RD, step.order(whole2.size(-1)))


def judge_experts_back(step: StepParts, name: str) -> None:
    """Judge the gradients of the experts' inputs, intermediates, gates and weights."""
    up, down, high = step.rounding.up, step.rounding.down, step.rounding.high
    (whole13, lora13), (whole2, lora2) = _sides(step, name)
    w13, w2 = (
        low.transposed(low.weight_for("dgrad", whole13, up)),
        low.transposed(low.weight_for("dgrad", whole2, down)),
    )
    made13, made2 = SumOverCalls(), SumOverCalls()
    for call in step.calls.get(name, []):
        if not call.has("dy", "dh"):
            continue
        counts, times, gates, given = _rows(call), _times(call), call.get("gates"), NearNumbers(call.get("dy"))
        add_to = partial(_add_rows, step, call)
        dy_RD = low.cast_rows(given, counts, down.dgrad[0], -1)
        da_RF, order = times(dy_RD, w2), step.order(whole2.size(-2))
        a_RF = low.swiglu(call.get("h"), gates)
        a = low.rounded(NearNumbers(a_RF), high, low.CURVED * a_RF.abs())
        back_of = partial(_swiglu_back, call, high, order, bool(lora2.names))
        h, dropped, of_w2 = NearNumbers(call.get("h")), LoraCall(call, "dropped_a", a, times), partial(add_to, whole2)
        if lora2.names and not step.rounding.is_fp8:
            da_RF = lora2.add_back(da_RF, given, dropped, of_w2)
        back = back_of(low.cast_rows(h, counts, step.rounding.swiglu, -1), da_RF)
        dh, dgates = back.dh, back.dgates
        if (
            lora2.names and step.rounding.is_fp8
        ):  # in FP8, LoRA gets its input from a separate SwiGLU of h before the cast
            more = back_of(h, lora2.add_back(None, given, dropped, of_w2))
            dh, dgates = _added(back.dh, more.dh, high), _added(back.dgates, more.dgates, FORMATS["fp32"])
        step.compare("SwiGLU of experts", call, "dh", dh, IN_ELEMENTS)
        if call.has("dgates"):
            order = step.order(whole2.size(-1))
            step.compare("SwiGLU of experts", call, "dgates", dgates, order, FORMATS["fp32"])
        dh, x = NearNumbers(call.get("dh")), NearNumbers(call.get("x"))
        dx_RD = times(low.cast_rows(dh, counts, up.dgrad[0], -1), w13)
        if lora13.names:
            dx_RD = lora13.add_back(dx_RD, dh, LoraCall(call, "dropped", x, times), partial(add_to, whole13))
        if call.has("dx"):
            step.compare("matmuls of experts", call, "dx", dx_RD, step.order(whole13.size(-2)))
        if f"{name}.experts.w13" not in step.trained:
            continue
        x = low.cast_rows(x, counts, up.kept, -1)
        for made, rules, whole, sides in ((made13, up, whole13, (dh, x)), (made2, down, whole2, (dy_RD, back.a))):
            left, right = (low.cast_rows(one, counts, rule, -2) for one, rule in zip(sides, rules.wgrad, strict=True))
            made.add_rows(left, right, counts, _here(call), len(whole), _rounds_gradients(step))
    for part, lora, made in (("w2", lora2, made2), ("w13", lora13, made13)):
        lora.judge_gradients()
        step.compare_gradient(f"{name}.experts.{part}", made)


def _sides(step: StepParts, name: str) -> list[tuple[Tensor, WeightLora]]:
    """Returns both matmuls' weights, each with its LoRA A and B."""
    names = [f"{name}.experts.{part}" for part in ("w13", "w2")]
    return [(step.weights[each], WeightLora(step, each)) for each in names]


def _rows(call: PartCall) -> list[int]:
    """Returns the number of rows of each expert."""
    return call.tensors["counts"].tolist()


def _here(call: PartCall) -> range:
    """Returns the indices of this rank's experts."""
    first = int(call.tensors["first"])
    return range(first, first + len(call.tensors["counts"]))


def _times(call: PartCall) -> RowMatmul:
    return partial(_by_expert, _rows(call), _here(call))


def _by_expert(counts: list[int], here: range, rows: NearNumbers, weight: NearNumbers) -> Total:
    """Multiplies each expert's rows by the expert's matrix. counts: rows per expert."""
    empty = rows.x.new_zeros(0, weight.x.size(1))
    parts = [Total(empty, empty, empty)]
    for expert, one in zip(here, low.split_rows(rows, counts), strict=True):
        if len(one.x):
            off = None if weight.off is None else weight.off[expert]
            made = low.matmul(one, NearNumbers(weight.x[expert], off))
            parts.append(made._replace(off=low.slack(made)))
    return Total(*map(torch.cat, zip(*parts, strict=True)))


def _add_rows(
    step: StepParts, call: PartCall, base: Tensor, made: SumOverCalls, dy: NearNumbers, x: NearNumbers
) -> None:
    """Add one call to the gradient of the experts' LoRA A or B."""
    made.add_rows(dy, x, _rows(call), _here(call), len(base), step.rounds_gradients)


def _swiglu_back(
    call: PartCall, high: PlainFormat, order: Bound, cancels: bool, h: NearNumbers, da: Total
) -> low.SwigluSlopes:
    """Returns the results of SwiGLU's backward.

    - h, da: input of SwiGLU, and gradient of its output.
    - cancels: whether da is a sum of rounded terms that may cancel. Errors of the input's gradient dh are then relative
      to the magnitudes of these terms.
    """
    back = low.swiglu_backward(h, call.get("gates"), low.rounded(da, high, order.value * da.size), high)
    if not cancels:
        return back
    sizes = low.swiglu_backward(h, call.get("gates"), NearNumbers(da.size), high)
    return back._replace(dh=back.dh._replace(size=sizes.dh.size))


def _added(one: Total, other: Total, form: PlainFormat) -> Total:
    """Rounds two results to `form`, and returns the sum."""
    off = low.slack(one) + low.slack(other) + (low.spacing(one.x, form) + low.spacing(other.x, form)) / 2
    return Total(one.x + other.x, one.size + other.size, off)
