"""Products in fp32 or bf16: the plain recipe. bf16 products accumulate in fp32 inside the kernels.

On a CPU those of bf16 may be compiled code (train/model/compiled_products.py), to which torch's are the reference.

Shapes: D width, F inner width, E experts of this rank, R rows sorted by expert; I inputs and O outputs of a product.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from train.model import compiled_products
from train.model.compiled_products import CompiledLinear, fits
from train.model.layers import recomputed_swiglu, swiglu
from train.model.needed import gradients_needed
from train.precision import grouped
from train.precision.health import Report

Groups = Tensor | list[int]
"""Which rows are an expert's: where those of each end, int32 (E,), or on a CPU in bf16 how many each has (grouped.py)."""


class HighPrecision:
    """Products with operands in dtype, torch.float32 or torch.bfloat16.

    recompute_swiglu: whether experts make their SwiGLU output again in backward instead of keeping it.
    """

    def __init__(self, dtype: torch.dtype, recompute_swiglu: bool = True):
        self.dtype = dtype
        self._recompute_swiglu = recompute_swiglu

    def linear(self, x: Tensor, weight: Tensor, kind: str = "dense") -> Tensor:
        weight = weight.to(self.dtype)
        return CompiledLinear.apply(x, weight) if fits(x, weight) else F.linear(x, weight)

    def expert_ffn(
        self, rows_RD: Tensor, gates_R: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, counts_E: Tensor
    ) -> Tensor:
        groups = groups_of(counts_E, self.dtype)
        h_R2F = _GroupedProduct.apply(rows_RD, w13_E2FD.to(self.dtype), groups)
        a_RF = swiglu(h_R2F, gates_R)
        with recomputed_swiglu(a_RF, h_R2F, gates_R) if self._recompute_swiglu else nullcontext():
            return _GroupedProduct.apply(a_RF, w2_EDF.to(self.dtype), groups)

    def watch(self, model: nn.Module) -> None:
        """Nothing is quantised, so there is nothing to watch."""

    def start_step(self, step: int) -> None:
        """See watch."""

    def health(self) -> Report:
        """See watch."""
        return Report({}, {}, [])


class _GroupedProduct(torch.autograd.Function):
    """x W^T with the weight of each row's expert. Saves the weight itself, where F.grouped_mm's own backward would keep
    a view of it: a view holds its memory also where the weight is let go until backward (ZeRO stage 3).
    """

    @staticmethod
    def forward(ctx, x_RI: Tensor, weight_EOI: Tensor, groups: Groups):
        ctx.save_for_backward(x_RI, weight_EOI)
        ctx.groups = groups
        return grouped_product(x_RI, weight_EOI.transpose(1, 2), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RO):
        x_RI, weight_EOI = ctx.saved_tensors
        x_needed, weight_needed, _ = gradients_needed(ctx)
        dx_RI = grouped_product(grad_RO, weight_EOI, ctx.groups) if x_needed else None
        dweight_EOI = grouped_weight_gradient(grad_RO, x_RI, ctx.groups) if weight_needed else None
        return dx_RI, dweight_EOI, None


def groups_of(counts_E: Tensor, dtype: torch.dtype) -> Groups:
    """Groups for products in dtype. counts_E: rows of every expert."""
    if dtype == torch.bfloat16 and not counts_E.is_cuda:
        return counts_E.tolist()
    return counts_E.cumsum(0).to(torch.int32)


def grouped_product(x_RI: Tensor, weight_EIO: Tensor, groups: Groups) -> Tensor:
    """x W with the weight of each row's expert: (R, O)."""
    if isinstance(groups, list):
        if fits(x_RI, weight_EIO):
            return compiled_products.grouped(x_RI, weight_EIO.mT, groups)
        return grouped.product(x_RI, weight_EIO, groups)
    if len(x_RI) == 0:  # a rank may get none, and torch's CUDA kernel refuses some empty operands
        return x_RI.new_empty(0, weight_EIO.shape[2])
    return F.grouped_mm(x_RI, weight_EIO, offs=groups)


def grouped_weight_gradient(grad_RO: Tensor, x_RI: Tensor, groups: Groups) -> Tensor:
    """grad^T x over the rows of each expert: (E, O, I); of compiled code in fp32."""
    if isinstance(groups, list):
        if fits(grad_RO, x_RI):
            return compiled_products.grouped_weight_gradient(grad_RO.t(), x_RI.t(), groups)
        return grouped.weight_gradient(grad_RO, x_RI, groups)
    if len(x_RI) == 0:
        return x_RI.new_zeros(len(groups), grad_RO.shape[1], x_RI.shape[1])
    return F.grouped_mm(grad_RO.t(), x_RI, offs=groups)
