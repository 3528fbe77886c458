"""Parts that every block shares: linear layers, RMSNorm, SwiGLU, embedding.

Norm and SwiGLU in bf16 on a CPU are there as compiled code too (train/model/compiled_rows.py), to which these are the reference.

Shapes: N rows (any leading axes flattened), D width, F inner width, E experts, R rows routed to experts, V vocabulary.
"""

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from train.model import compiled_rows
from train.model.compiled_rows import fits
from train.model.needed import gradients_needed
from train.model.recompute import Recomputed


class LayerPrecision(Protocol):
    """The number formats of the matrix products. The model asks for products and never branches on precision."""

    dtype: torch.dtype
    """Format of activations between the products."""

    def linear(self, x: Tensor, weight: Tensor, kind: str = "dense") -> Tensor:
        """x (..., D) times weight (F, D) transposed: (..., F). kind: see `Linear`."""
        ...

    def expert_ffn(
        self, rows_RD: Tensor, gates_R: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, counts_E: Tensor
    ) -> Tensor:
        """SwiGLU FFN of every expert on its own rows: (R, D).

        rows_RD is sorted by expert and counts_E (int64) says how many rows each has. The gate value of a row scales the
        SwiGLU output, before the down-projection.
        """
        ...


class Linear(nn.Module):
    """Product without bias, in the precision of the run.

    kind: `dense`, or `output` for the attention's output projection, whose input FP8 keeps in a finer format.
    """

    def __init__(self, inputs: int, outputs: int, precision: LayerPrecision, kind: str = "dense", **factory):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, **factory))
        self._precision, self._kind = precision, kind

    def forward(self, x: Tensor) -> Tensor:
        return self._precision.linear(x, self.weight, self._kind)


class Embedding(nn.Module):
    """Table of token vectors. The gradient is summed in fp32 whatever the format of the table."""

    def __init__(self, rows: int, width: int, **factory):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width, **factory))

    def forward(self, tokens: Tensor) -> Tensor:
        return _Embed.apply(tokens, self.weight)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows = weight_VD.size(0)
        return F.embedding(tokens, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (tokens,) = ctx.saved_tensors
        return None, torch.ops.aten.embedding_dense_backward(grad.float(), tokens, ctx.rows, -1, False)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, statistics in fp32.

    recompute: whether products that take the output keep only the input of the norm for backward.
    """

    def __init__(self, width: int, eps: float, recompute: bool, **factory):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, **factory))
        self._eps, self._recompute = eps, recompute

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self._eps)

    def with_recipe(self, x: Tensor) -> tuple[Tensor, AbstractContextManager]:
        """The output, and the context for the products that take it (see `Recomputed`)."""
        y = self(x)
        if not (self._recompute and torch.is_grad_enabled()):
            return y, nullcontext()
        source, eps = x.detach(), self._eps
        # The weight is asked for when it is needed: it may be away in the meantime (ZeRO stage 3).
        return y, Recomputed(lambda: rms_norm(source, self.weight, eps)[0], y)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalised x, and 1 / rms(x) as fp32 (..., 1)."""
    if x.is_cuda:
        return torch.ops.aten._fused_rms_norm(x, weight_D.shape, weight_D, eps)
    if fits(x, weight_D):
        return compiled_rows.rms_norm(x, weight_D, eps)
    x32 = x.float()
    rstd = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().mul_(1 / x.size(-1)).add_(eps).rsqrt_()
    return (x32 * rstd).mul_(weight_D).to(x.dtype), rstd


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and 1 / rms only. With u = grad * weight: dx = rstd * (u - x * rstd^2 * mean(u * x))."""

    @staticmethod
    def forward(ctx, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y, rstd = rms_norm(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight_D, rstd = ctx.saved_tensors
        x_needed, weight_needed, _ = gradients_needed(ctx)
        if x.is_cuda:
            dx, dweight = torch.ops.aten._fused_rms_norm_backward(
                grad.contiguous(), x, weight_D.shape, rstd, weight_D, [x_needed, weight_needed]
            )
            return dx if x_needed else None, dweight if weight_needed else None, None
        if fits(x, weight_D):
            return *compiled_rows.rms_norm_backward(grad, x, weight_D, rstd, x_needed, weight_needed), None
        x_ND, grad_ND = x.flatten(0, -2).float(), grad.flatten(0, -2).float()
        rstd_N1, weight_D = rstd.view(-1, 1), weight_D.float()
        product_ND = x_ND * grad_ND
        # Both sums over x * grad are matrix-vector products: one pass over memory each.
        dweight_D = torch.mv(product_ND.t(), rstd_N1.view(-1)) if weight_needed else None
        if not x_needed:
            return None, dweight_D, None
        slope_N1 = torch.mv(product_ND, weight_D).view(-1, 1).mul_(rstd_N1.pow(3)).div_(x.size(-1))
        dx_ND = (grad_ND * weight_D).mul_(rstd_N1).addcmul_(x_ND, slope_N1, value=-1)
        return dx_ND.to(x.dtype).view(x.shape), dweight_D, None


def swiglu(h_N2F: Tensor, gates_N: Tensor | None = None) -> Tensor:
    """silu(gate) * up of h = [gate | up], times the row's gate value where given: (N, F); arithmetic in fp32."""
    return _SwiGLU.apply(h_N2F, gates_N)


PIECE = 2**18
"""Elements of [gate | up] whose fp32 copies stay in a CPU's cache."""


def _pieces(h_N2F: Tensor, *rows: Tensor | None) -> Iterator[tuple]:
    """The same rows of all tensors, PIECE elements at a time on a CPU, everything at once on a GPU."""
    size = h_N2F.size(0) if h_N2F.is_cuda else PIECE // h_N2F.size(1)
    splits = [t.split(max(1, size)) if t is not None else itertools.repeat(None) for t in (h_N2F, *rows)]
    return zip(*splits, strict=False)


def swiglu_forward(h_N2F: Tensor, gates_N: Tensor | None) -> Tensor:
    """`swiglu` without gradient."""
    if fits(h_N2F):
        return compiled_rows.swiglu(h_N2F, gates_N)
    out_NF = h_N2F.new_empty(h_N2F.size(0), h_N2F.size(1) // 2)
    for h, gates, out in _pieces(h_N2F, gates_N, out_NF):
        gate, up = h.float().chunk(2, -1)
        product = F.silu(gate).mul_(up)
        out.copy_(product if gates is None else product.mul_(gates.unsqueeze(-1)))
    return out_NF


def _swiglu_backward(grad_NF: Tensor, h_N2F: Tensor, gates_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of h and of the gate values, for one piece, fp32."""
    gate_NF, up_NF = h_N2F.float().chunk(2, -1)
    dup_NF = F.silu(gate_NF).mul_(grad_NF)
    dsilu_NF = grad_NF * up_NF
    dgates_N = None
    if gates_N is not None:
        dgates_N = (dup_NF * up_NF).sum(-1)
        dup_NF.mul_(gates_N.unsqueeze(-1))
        dsilu_NF.mul_(gates_N.unsqueeze(-1))
    return torch.cat([torch.ops.aten.silu_backward(dsilu_NF, gate_NF), dup_NF], -1), dgates_N


class _SwiGLU(torch.autograd.Function):
    """Keeps [gate | up] only and computes the rest again in backward."""

    @staticmethod
    def forward(ctx, h_N2F: Tensor, gates_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(h_N2F, gates_N)
        return swiglu_forward(h_N2F, gates_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NF: Tensor):
        h_N2F, gates_N = ctx.saved_tensors
        if fits(h_N2F):
            return compiled_rows.swiglu_backward(grad_NF, h_N2F, gates_N)
        dh_N2F = torch.empty_like(h_N2F)
        dgates_N = None if gates_N is None else torch.empty_like(gates_N)
        for h, grad, gates, dh, dgates in _pieces(h_N2F, grad_NF, gates_N, dh_N2F, dgates_N):
            dh_piece, dgates_piece = _swiglu_backward(grad, h, gates)
            dh.copy_(dh_piece)
            if dgates is not None:
                dgates.copy_(dgates_piece)
        return dh_N2F, dgates_N


class FFN(nn.Module):
    """SwiGLU feed-forward network: w2(silu(w1 x) * w3 x). w13 holds the rows of w1, then those of w3."""

    def __init__(self, width: int, inner: int, precision: LayerPrecision, recompute: bool, **factory):
        super().__init__()
        self.w13 = Linear(width, 2 * inner, precision, **factory)
        self.w2 = Linear(inner, width, precision, **factory)
        self._recompute = recompute

    def forward(self, x_ND: Tensor, recipe: AbstractContextManager) -> Tensor:
        """recipe: the context in which saving x costs nothing (`RMSNorm.with_recipe`)."""
        with recipe:
            h_N2F = self.w13(x_ND)
        a_NF = swiglu(h_N2F)
        with recomputed_swiglu(a_NF, h_N2F, None) if self._recompute else nullcontext():
            return self.w2(a_NF)


def recomputed_swiglu(a_NF: Tensor, h_N2F: Tensor, gates_N: Tensor | None) -> AbstractContextManager:
    """Context in which saving a = swiglu(h, gates) keeps nothing new: h and gates are kept for SwiGLU anyway."""
    if not torch.is_grad_enabled():
        return nullcontext()
    h, gates = h_N2F.detach(), None if gates_N is None else gates_N.detach()
    return Recomputed(lambda: swiglu_forward(h, gates), a_NF)
