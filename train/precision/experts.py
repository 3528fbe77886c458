"""The FFN of the routed experts with FP8 products, SwiGLU between them, and little kept.

    forward     h = Q(x) Q(w13)^T                      bf16
                y = Q(silu(g) u * gate) Q(w2)^T        the router's gate value inside SwiGLU, before the cast
                keeps Q(x) and Q(h): one byte a value each, and the gates
    backward    da = Q(dy) Q(w2)
                a, dh, dgate from D(Q(h)) and da       SwiGLU's output is computed again (paper 3.3.3)
                dw2 = Q'(D(Q(dy)))^T Q'(a)             dy is what the dispatcher's wire brought: FP8 already
                dx = Q(dh) Q(w13),  dw13 = Q'(dh)^T Q'(D(Q(x)))

Rows are padded per expert to 128 once, on entry (train/precision/groups.py).

Shape suffixes: R rows sorted by expert, P padded rows, D width, F inner width, E experts.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from train.precision import swiglu
from train.precision.groups import Groups
from train.precision.health import Probe
from train.precision.linear import keep, left_source
from train.precision.products import Engine, Source, pack, unpack
from train.precision.recipe import Product, Recipe

Probes = tuple[Probe, Probe]


def expert_ffn(
    rows_RD: Tensor,
    gates_R: Tensor,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
    counts_E: Tensor,
    engine: Engine,
    recipe: Recipe,
    probes: Probes | None,
) -> Tensor:
    """SwiGLU FFN of every expert on its own rows: (R, D) in the rows' format. probes: of w13 and of w2."""
    return _ExpertFFN.apply(rows_RD, gates_R, w13_E2FD, w2_EDF, counts_E, engine, recipe, probes)


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD, gates_R, w13_E2FD, w2_EDF, counts_E, engine, recipe, probes):
        groups, dtype = Groups.of(counts_E), rows_RD.dtype
        up, down = recipe.experts_up, recipe.experts_down
        x_PD, gates_P = groups.pad(rows_RD), groups.pad(gates_R)
        x = keep(x_PD, engine, up)
        left = engine.operand(left_source(x, x_PD, up), up.fprop.left)
        h_P2F = engine.grouped(left, engine.operand(w13_E2FD, up.fprop.right), groups, dtype)
        a = engine.swiglu(h_P2F, gates_P, down.fprop.left)
        y_PD = engine.grouped(a, engine.operand(w2_EDF, down.fprop.right), groups, dtype)
        h = h_P2F if recipe.swiglu is None else engine.keep(h_P2F, recipe.swiglu)
        tensors, ctx.forms = pack(gates_P, w13_E2FD, w2_EDF, x, h)
        ctx.save_for_backward(*tensors)
        ctx.groups, ctx.engine, ctx.recipe, ctx.probes, ctx.dtype = groups, engine, recipe, probes, dtype
        if probes is not None:
            _probe_forward(probes, recipe, groups, (x_PD, h_P2F, gates_P, y_PD), w13_E2FD, w2_EDF)
        return groups.unpad(y_PD)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_RD):
        groups, engine, dtype = ctx.groups, ctx.engine, ctx.dtype
        up, down = ctx.recipe.experts_up, ctx.recipe.experts_down
        gates_P, w13_E2FD, w2_EDF, x, h = unpack(ctx.saved_tensors, ctx.forms)
        dy = groups.pad(dy_RD)
        if down.dgrad.left.format is not None:
            dy = engine.cast(dy, down.dgrad.left.cast())
        w2 = engine.operand(w2_EDF, down.dgrad.right, transposed=True)
        da_PF = engine.grouped(engine.operand(dy, down.dgrad.left), w2, groups, dtype)
        a_PF, dh_P2F, dgates_P = engine.swiglu_backward(h, gates_P, da_PF)
        dw2_EDF = _wgrad(dy, a_PF, down.wgrad, engine, groups, w2_EDF.dtype)
        w13 = engine.operand(w13_E2FD, up.dgrad.right, transposed=True)
        dx_PD = engine.grouped(engine.operand(dh_P2F, up.dgrad.left), w13, groups, dtype)
        dw13_E2FD = _wgrad(dh_P2F, x, up.wgrad, engine, groups, w13_E2FD.dtype)
        if ctx.probes is not None:
            ctx.probes[0].operand("gradient", dh_P2F, up.dgrad.left)
            ctx.probes[1].operand("gradient", groups.pad(dy_RD), down.dgrad.left)
        return groups.unpad(dx_PD), groups.unpad(dgates_P), dw13_E2FD, dw2_EDF, None, None, None, None


def _wgrad(left: Source, right: Source, rules: Product, engine: Engine, groups: Groups, dtype: torch.dtype) -> Tensor:
    """The gradient of every expert's weight, contracted over its own rows."""
    left = engine.operand(left, rules.left, transposed=True, groups=groups)
    right = engine.operand(right, rules.right, transposed=True, groups=groups)
    return engine.grouped_wgrad(left, right, groups, dtype)


def _probe_forward(probes: Probes, recipe: Recipe, groups: Groups, values: tuple, w13: Tensor, w2: Tensor) -> None:
    """Look at the operands of both projections, and shadow the products of the busiest expert."""
    x_PD, h_P2F, gates_P, y_PD = values
    up, down = recipe.experts_up, recipe.experts_down
    a_PF = swiglu.forward(h_P2F, gates_P)
    probes[0].operand("activation", x_PD, up.fprop.left)
    probes[0].operand("weight", w13, up.fprop.right)
    probes[1].operand("activation", a_PF, down.fprop.left)
    probes[1].operand("weight", w2, down.fprop.right)
    busiest = max(range(len(groups.counts)), key=groups.counts.__getitem__)
    rows = groups.real()[busiest]
    probes[0].product("fprop", h_P2F[rows], x_PD[rows], w13[busiest])
    probes[1].product("fprop", y_PD[rows], a_PF[rows], w2[busiest])
