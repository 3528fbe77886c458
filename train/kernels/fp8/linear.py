"""A linear layer whose three products run as the rules says, and which keeps its input in FP8.

    forward     y  = Q(x) Q(w)^T                   keeps Q(x): one byte a value and the scales
    backward    dx = Q(dy) Q(w)
                dw = Q'(dy)^T Q'(D(Q(x)))          Q' in 128x1 tiles; D dequantises (paper 3.3.3, 3.5.2)

What is kept need not be what Fprop used: the attention's output is kept in E5M6 (12 bits).  Where the model keeps the
input anyway, or makes it again (`train.model.recompute`), the layer saves the input itself and casts it again in
backward, with the same result.

Shape suffixes: T tokens (leading axes flattened), K inputs, N outputs.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from train.kernels.fp8.cast_rules import LayerCasts
from train.kernels.fp8.engines import Fp8Engine, Source, pack_sources, unpack_sources
from train.kernels.fp8.groups import PaddedGroups
from train.kernels.fp8.health import LayerProbe
from train.kernels.fp8.held_weights import HeldWeights
from train.kernels.fp8.quantize import fitted
from train.model.layers import HeldInput
from train.model.needed import Function, gradients_needed, once_differentiable
from train.model.recompute import is_free
from train.model.weight_gradient import weight_gradient


def linear(
    x: Tensor,
    weight_NK: Tensor,
    weights: HeldWeights,
    rules: LayerCasts,
    probe: LayerProbe | None,
    held: HeldInput | None = None,
) -> Tensor:
    """x (..., K) times weight transposed: (..., N) in the format of x. held: x as it is kept, where somebody else keeps it too."""
    return _Linear.apply(x, weight_NK, weights, rules, probe, not torch.is_grad_enabled(), is_free(x), held)


def keep(x_MK: Tensor, engine: Fp8Engine, rules: LayerCasts) -> Source:
    """The form in which an input waits for Wgrad."""
    return x_MK if rules.cache is None else engine.keep(x_MK, rules.cache)


def left_source(kept: Source, x_MK: Tensor, rules: LayerCasts) -> Source:
    """What Fprop's activation is made of: the kept form where that is the very same cast."""
    rule = rules.fprop.left
    same = not isinstance(kept, Tensor) and rule.format is not None and kept.cast == fitted(rule.cast(), x_MK)
    return kept if same else x_MK


def gradient_operands(
    dy: Source,
    engine: Fp8Engine,
    rules: LayerCasts,
    inputs_needed: bool,
    weights_needed: bool,
    groups: PaddedGroups | None = None,
) -> tuple[Any, Any]:
    """The left operands of Dgrad and of Wgrad, None for a product that is not made. groups: of an expert's rows."""
    if inputs_needed and weights_needed:
        return engine.gradient(dy, rules.dgrad.left, rules.wgrad.left, groups)
    for_inputs = engine.operand(dy, rules.dgrad.left) if inputs_needed else None
    for_weights = engine.operand(dy, rules.wgrad.left, transposed=True, groups=groups) if weights_needed else None
    return for_inputs, for_weights


class _Linear(Function):
    @staticmethod
    def forward(ctx, x, weight_NK, weights, rules, probe, only_forward, free, held):
        x_TK = x.reshape(-1, x.shape[-1])  # here, where a view costs autograd nothing
        engine, ctx.name = weights.engine, weights.name(weight_NK)
        kept = x_TK if only_forward or free else keep(x_TK, engine, rules) if held is None else held.source
        left = engine.operand(left_source(kept, x_TK, rules), rules.fprop.left)
        y_TN = engine.product(left, weights.operand(weight_NK, ctx.name, rules.fprop.right), x_TK.dtype)
        tensors, ctx.forms = pack_sources(*[kept] * ctx.needs_input_grad[1])  # a frozen weight wants nothing of x
        ctx.save_for_backward(weight_NK, *tensors)
        ctx.weights, ctx.rules, ctx.probe, ctx.dtype, ctx.shape = weights, rules, probe, x.dtype, x.shape
        if probe is not None:
            probe.operand("activation", x_TK, rules.fprop.left)
            probe.operand("weight", weight_NK, rules.fprop.right)
            probe.product("fprop", y_TN, x_TK, weight_NK)
        return y_TN.view(*x.shape[:-1], weight_NK.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        engine, rules, probe, dy_TN = ctx.weights.engine, ctx.rules, ctx.probe, dy.reshape(-1, dy.shape[-1])
        weight_NK, *tensors = ctx.saved_tensors
        x_needed, weight_needed, *_ = gradients_needed(ctx)
        dx_TK = dw_NK = None
        left, left_t = gradient_operands(dy_TN, engine, rules, x_needed, weight_needed)
        if x_needed:
            right = ctx.weights.operand(weight_NK, ctx.name, rules.dgrad.right, transposed=True)
            dx_TK = engine.product(left, right, ctx.dtype)
        if weight_needed:
            (kept,) = unpack_sources(tensors, ctx.forms)
            if isinstance(kept, Tensor) and rules.cache is not None:
                right = engine.cast_again(kept, rules.cache, rules.wgrad.right)
            else:
                right = engine.operand(kept, rules.wgrad.right, transposed=True)
            dw_NK = weight_gradient(ctx, 1, weight_NK, partial(engine.product, left_t, right))
        if probe is not None and dx_TK is not None:
            probe.operand("gradient", dy_TN, rules.dgrad.left)
            probe.product("dgrad", dx_TK, dy_TN, weight_NK.t())
        return None if dx_TK is None else dx_TK.view(ctx.shape), dw_NK, None, None, None, None, None, None
