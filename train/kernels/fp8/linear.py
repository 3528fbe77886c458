"""Computes linear layers and the FFN of routed experts with FP8 matmuls. The inputs of layers are saved in FP8.

    linear      y  = Q(x) Q(w)^T                   saves Q(x): one byte per value, and the scales
      backward  dx = Q(dy) Q(w)
                dw = Q'(dy)^T Q'(D(Q(x)))          Q' in 128x1 tiles; D dequantises (paper 3.3.3, 3.5.2)

    up          h = Q(x) Q(w13)^T                  bf16; saves Q(x)
      backward  dx = Q(dh) Q(w13)
                dw13 = Q'(dh)^T Q'(D(Q(x)))

    down        y = Q(silu(g) u * gate) Q(w2)^T    the router's gate value inside SwiGLU, before the cast
                                                   saves Q(h) and the gates
      backward  da = Q(dy) Q(w2)
                a, dh, dgate from D(Q(h)) and da   SwiGLU's output is recomputed (paper 3.3.3)
                dw2 = Q'(D(Q(dy)))^T Q'(a)         the dispatcher delivers dy in FP8 already

The cast of the saved input may differ from the cast in Fprop. If the model saves or recomputes the original input
anyway (`train.model.recompute`), the layer saves nothing, and backward casts the original again.

If the dispatcher sends FP8, x and dy arrive quantised (parallel/expert/wire.py). If the rules require the same cast,
the arrived codes are Q(x) and Q(dy).

Shape suffixes: T tokens (leading axes flattened), K inputs, N outputs; R rows sorted by expert, P rows in the layout
that the GEMMs read, D width, F inner width, E experts.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from parallel.expert.wire import QuantizedRows
from train.kernels.fp8 import swiglu
from train.kernels.fp8.cast_rules import CastRules, LayerCasts, MatmulRules, OperandRule
from train.kernels.fp8.engines import Fp8Engine, HeldWeights, Source, pack_sources, unpack_sources
from train.kernels.fp8.formats import E4M3, TILE, Cast
from train.kernels.fp8.groups import PaddedGroups
from train.kernels.fp8.health import LayerProbe
from train.kernels.fp8.quantize import fitted
from train.model.layers import AddedMatmul, HeldInput, recomputed_swiglu
from train.model.layers import swiglu as swiglu_of
from train.model.needed import Function, gradients_needed, once_differentiable
from train.model.operations import Kernels
from train.model.recompute import is_free
from train.model.weight_gradient import weight_gradient

Probes = tuple[LayerProbe, LayerProbe]


def linear(
    x: Tensor,
    weight_NK: Tensor,
    weights: HeldWeights,
    rules: LayerCasts,
    probe: LayerProbe | None,
    held: HeldInput | None = None,
) -> Tensor:
    """Multiplies x (..., K) by the transposed weight. Returns (..., N) in the dtype of x.

    held: the saved form of x, if other code saves x too.
    """
    return _Linear.apply(x, weight_NK, weights, rules, probe, not torch.is_grad_enabled(), is_free(x), held)


def keep(x_MK: Tensor, engine: Fp8Engine, rules: LayerCasts) -> Source:
    """Returns the input in the form that is saved for Wgrad."""
    return engine.keep(x_MK, rules.cache)


def left_source(kept: Source, x_MK: Tensor, rules: LayerCasts) -> Source:
    """Returns the input for Fprop's left operand: the saved form `kept` if it has Fprop's cast, else x_MK."""
    rule = rules.fprop.left
    same = not isinstance(kept, Tensor) and kept.cast == fitted(rule.cast(), x_MK)
    return kept if same else x_MK


def gradient_operands(
    dy: Source,
    engine: Fp8Engine,
    rules: LayerCasts,
    inputs_needed: bool,
    weights_needed: bool,
    groups: PaddedGroups | None = None,
) -> tuple[Any, Any]:
    """Returns the left operands of Dgrad and Wgrad; None for a matmul that is not needed."""
    if inputs_needed and weights_needed:
        return engine.gradient(dy, rules.dgrad.left, rules.wgrad.left, groups)
    for_inputs = engine.operand(dy, rules.dgrad.left) if inputs_needed else None
    for_weights = engine.operand(dy, rules.wgrad.left, transposed=True, groups=groups) if weights_needed else None
    return for_inputs, for_weights


class _Linear(Function):
    @staticmethod
    def forward(ctx, x, weight_NK, weights, rules, probe, only_forward, free, held):
        x_TK = x.reshape(-1, x.shape[-1])  # autograd does not record this reshape
        engine, ctx.name = weights.engine, weights.name(weight_NK)
        kept = x_TK if only_forward or free else keep(x_TK, engine, rules) if held is None else held.source
        left = engine.operand(left_source(kept, x_TK, rules), rules.fprop.left)
        y_TN = engine.matmul(left, weights.operand(weight_NK, ctx.name, rules.fprop.right), x_TK.dtype)
        tensors, ctx.forms = pack_sources(*[kept] * ctx.needs_input_grad[1])  # a frozen weight does not need x
        ctx.save_for_backward(weight_NK, *tensors)
        ctx.weights, ctx.rules, ctx.probe, ctx.dtype, ctx.shape = weights, rules, probe, x.dtype, x.shape
        if probe is not None:
            probe.operand("activation", x_TK, rules.fprop.left)
            probe.operand("weight", weight_NK, rules.fprop.right)
            probe.matmul("fprop", y_TN, x_TK, weight_NK)
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
            dx_TK = engine.matmul(left, right, ctx.dtype)
        if weight_needed:
            (kept,) = unpack_sources(tensors, ctx.forms)
            if isinstance(kept, Tensor):
                right = engine.cast_again(kept, rules.cache, rules.wgrad.right)
            else:
                right = engine.operand(kept, rules.wgrad.right, transposed=True)
            dw_NK = weight_gradient(ctx, 1, weight_NK, partial(engine.matmul, left_t, right))
        if probe is not None and dx_TK is not None:
            probe.operand("gradient", dy_TN, rules.dgrad.left)
            probe.matmul("dgrad", dx_TK, dy_TN, weight_NK.t())
        return None if dx_TK is None else dx_TK.view(ctx.shape), dw_NK, None, None, None, None, None, None


def expert_ffn(
    rows_RD: Tensor,
    gates_R: Tensor,
    weights: tuple[Tensor, Tensor],
    counts_E: Tensor,
    held: HeldWeights,
    casts: CastRules,
    probes: Probes | None,
    added: tuple[AddedMatmul | None, AddedMatmul | None],
    kernels: Kernels,
) -> Tensor:
    """Computes the SwiGLU FFN of every expert for the expert's rows. Returns (R, D) in the rows' dtype.

    rows_RD: rows sorted by expert. They and the gradient of the result may be `QuantizedRows`.
    weights: w13 (E, 2F, D) and w2 (E, D, F).
    probes: compute the health readings of w13 and of w2; None: no readings.
    added: adapters of w13 and of w2; None where there is no adapter.
    kernels: compute the adapters' matmuls in bf16 or fp32.
    """
    groups, (w13_E2FD, w2_EDF) = held.engine.groups(counts_E, len(rows_RD)), weights
    up, down = (None, None) if probes is None else probes
    h_P2F = _Up.apply(rows_RD, w13_E2FD, groups, held, casts, up)
    if added == (None, None):
        return _Down.apply(h_P2F, gates_R, w2_EDF, groups, held, casts, down)
    (added_up, added_down), high = added, kernels.groups(counts_E, rows_RD.dtype)
    if added_up is not None:
        h_R2F = added_up.add(_Moved.apply(h_P2F, groups.unpad, groups.pad), rows_RD, high)
        h_P2F = _Moved.apply(h_R2F, groups.pad, groups.unpad)
    y_RD = _Down.apply(h_P2F, gates_R, w2_EDF, groups, held, casts, down)
    if added_down is None:
        return y_RD
    h_R2F = _Moved.apply(h_P2F, groups.unpad, groups.pad)
    a_RF = swiglu_of(h_R2F, gates_R, kernels)
    with recomputed_swiglu(a_RF, h_R2F, gates_R, kernels):
        return added_down.add(y_RD, a_RF, high)


class _Moved(Function):
    """Converts rows between the layouts of the GEMMs and of the dispatcher. Backward converts the gradient back."""

    @staticmethod
    def forward(ctx, rows, there, back):
        ctx.back = back
        return there(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.back(grad), None, None


class _Up(Function):
    """Computes the gate and up projections of every expert."""

    @staticmethod
    def forward(ctx, rows_RD, w13_E2FD, groups, held, casts, probe):
        engine, ctx.name = held.engine, held.name(w13_E2FD)
        rules, dtype = casts.experts_up, rows_RD.dtype
        x = source = _arrived(rows_RD, groups, engine, rules.fprop.left)
        if isinstance(source, Tensor):
            x = keep(source, engine, rules)
            source = left_source(x, source, rules)
        left = engine.operand(source, rules.fprop.left)
        h_P2F = engine.grouped(left, held.operand(w13_E2FD, ctx.name, rules.fprop.right), groups, dtype)
        tensors, ctx.forms = pack_sources(*[x] * ctx.needs_input_grad[1])
        ctx.save_for_backward(w13_E2FD, *tensors)
        ctx.groups, ctx.held, ctx.rules, ctx.probe, ctx.dtype = groups, held, rules, probe, dtype
        if probe is not None:
            _probe_forward(probe, rules.fprop, groups, groups.pad(rows_RD), w13_E2FD, h_P2F)
        return h_P2F

    @staticmethod
    @once_differentiable
    def backward(ctx, dh_P2F):
        groups, engine, rules = ctx.groups, ctx.held.engine, ctx.rules
        w13_E2FD, *tensors = ctx.saved_tensors
        x_needed, weight_needed, *_ = gradients_needed(ctx)
        dx_RD = dw13_E2FD = None
        dh, dh_t = gradient_operands(dh_P2F, engine, rules, x_needed, weight_needed, groups)
        if x_needed:
            w13 = ctx.held.operand(w13_E2FD, ctx.name, rules.dgrad.right, transposed=True)
            dx_RD = groups.unpad(engine.grouped(dh, w13, groups, ctx.dtype))
            if ctx.probe is not None:
                ctx.probe.operand("gradient", dh_P2F, rules.dgrad.left)
        if weight_needed:
            (x,) = unpack_sources(tensors, ctx.forms)
            x = engine.operand(x, rules.wgrad.right, transposed=True, groups=groups)
            dw13_E2FD = weight_gradient(ctx, 1, w13_E2FD, partial(engine.grouped_wgrad, dh_t, x, groups))
        return dx_RD, dw13_E2FD, None, None, None, None


class _Down(Function):
    """Computes SwiGLU and the down projection of every expert."""

    @staticmethod
    def forward(ctx, h_P2F, gates_R, w2_EDF, groups, held, casts, probe):
        engine, ctx.name = held.engine, held.name(w2_EDF)
        rules, dtype, gates_P = casts.experts_down, h_P2F.dtype, groups.pad(gates_R)
        a, h = engine.swiglu(h_P2F, gates_P, rules.fprop.left, casts.swiglu)
        y_PD = engine.grouped(a, held.operand(w2_EDF, ctx.name, rules.fprop.right), groups, dtype)
        tensors, ctx.forms = pack_sources(h)
        ctx.save_for_backward(gates_P, w2_EDF, *tensors)
        ctx.groups, ctx.held, ctx.rules, ctx.probe, ctx.dtype = groups, held, rules, probe, dtype
        if probe is not None:
            _probe_forward(probe, rules.fprop, groups, swiglu.forward(h_P2F, gates_P), w2_EDF, y_PD)
        return groups.unpad(y_PD)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_RD):
        groups, engine, rules = ctx.groups, ctx.held.engine, ctx.rules
        gates_P, w2_EDF, *tensors = ctx.saved_tensors
        (h,) = unpack_sources(tensors, ctx.forms)
        h_needed, gates_needed, weight_needed, *_ = gradients_needed(ctx)
        dh_P2F = dgates_R = dw2_EDF = None
        dy = _arrived(dy_RD, groups, engine, rules.dgrad.left)
        if isinstance(dy, Tensor):
            dy = engine.cast(dy, rules.dgrad.left.cast())
        if h_needed or gates_needed:
            w2 = ctx.held.operand(w2_EDF, ctx.name, rules.dgrad.right, transposed=True)
            da_PF = engine.grouped(engine.operand(dy, rules.dgrad.left), w2, groups, ctx.dtype)
            a_PF, dh_P2F, dgates_P = engine.swiglu_backward(h, gates_P, da_PF)
            dgates_R = groups.unpad(dgates_P)
            if ctx.probe is not None:
                ctx.probe.operand("gradient", groups.pad(dy_RD), rules.dgrad.left)
        else:
            a_PF = engine.recompute_swiglu(h, gates_P)
        if weight_needed:
            dy = engine.operand(dy, rules.wgrad.left, transposed=True, groups=groups)
            a = engine.operand(a_PF, rules.wgrad.right, transposed=True, groups=groups)
            dw2_EDF = weight_gradient(ctx, 2, w2_EDF, partial(engine.grouped_wgrad, dy, a, groups))
        return dh_P2F, dgates_R, dw2_EDF, None, None, None, None


def _arrived(rows_RD: Tensor, groups: PaddedGroups, engine: Fp8Engine, rule: OperandRule) -> Source:
    """Returns the rows in the layout of the GEMMs. Rows that arrived quantised with the rule's cast stay quantised."""
    if isinstance(rows_RD, QuantizedRows):
        cast = Cast(E4M3, (1, TILE), pow2=True, floor=rows_RD.scale_floor)
        if rule.cast() == cast:
            q_PD = groups.pad(rows_RD.q_RD.view(torch.uint8)).view(rows_RD.q_RD.dtype)
            return engine.take_arrived(q_PD, groups.pad(rows_RD.scale_RS), cast)
        rows_RD = rows_RD.values()
    return groups.pad(rows_RD)


def _probe_forward(
    probe: LayerProbe, rules: MatmulRules, groups: PaddedGroups, x_PK: Tensor, weight_ENK: Tensor, y_PN: Tensor
) -> None:
    """Measure the quantisation of a projection's operands, and the GEMM error of the expert with most rows."""
    probe.operand("activation", x_PK, rules.left)
    probe.operand("weight", weight_ENK, rules.right)
    busiest = max(range(len(groups.counts)), key=groups.counts.__getitem__)
    rows = groups.real()[busiest]
    probe.matmul("fprop", y_PN[rows], x_PK[rows], weight_ENK[busiest])
