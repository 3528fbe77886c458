"""Products in fp32 or bf16: nothing is cast. bf16 products accumulate in fp32 inside the kernels.

What multiplies are the kernels that the object is given (train/model/operations.py).

Shapes: D width, F inner width, E experts of this rank, R rows sorted by expert; I inputs and O outputs of a product.
"""

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from train.kernels.fp8.health import Report
from train.model.layers import HeldInput, recomputed_swiglu, swiglu
from train.model.needed import Function, gradients_needed
from train.model.operations import ExpertGroups, Kernels
from train.model.weight_gradient import weight_gradient


class HighPrecision:
    """Products with operands in dtype, torch.float32 or torch.bfloat16.

    recompute_swiglu: whether experts make their SwiGLU output again in backward instead of keeping it.
    """

    def __init__(self, dtype: torch.dtype, kernels: Kernels, recompute_swiglu: bool = True):
        self.dtype, self.kernels = dtype, kernels
        self._recompute_swiglu = recompute_swiglu

    def linear(self, x: Tensor, weight: Tensor, kind: str = "dense", held: HeldInput | None = None) -> Tensor:
        return self.kernels.linear(x, weight.to(self.dtype))

    def hold(self, x: Tensor, kind: str) -> None:
        """Inputs are kept as they are."""

    def expert_ffn(
        self, rows_RD: Tensor, gates_R: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, counts_E: Tensor
    ) -> Tensor:
        kernels, groups = self.kernels, self.kernels.groups(counts_E, self.dtype)
        h_R2F = _GroupedProduct.apply(rows_RD, w13_E2FD.to(self.dtype), groups, kernels)
        a_RF = swiglu(h_R2F, gates_R, kernels)
        with recomputed_swiglu(a_RF, h_R2F, gates_R, kernels) if self._recompute_swiglu else nullcontext():
            return _GroupedProduct.apply(a_RF, w2_EDF.to(self.dtype), groups, kernels)

    def watch(self, model: nn.Module) -> None:
        """Nothing is quantised, so there is nothing to watch."""

    def start_step(self, step: int) -> None:
        """See watch."""

    def health(self) -> Report:
        """See watch."""
        return Report({}, {}, [])


class _GroupedProduct(Function):
    """x W^T with the weight of each row's expert. Saves the weight itself, where F.grouped_mm's own backward would keep
    a view of it: a view holds its memory also where the weight is let go until backward (ZeRO stage 3).
    """

    @staticmethod
    def forward(ctx, x_RI: Tensor, weight_EOI: Tensor, groups: ExpertGroups, kernels: Kernels):
        ctx.save_for_backward(x_RI, weight_EOI)
        ctx.groups, ctx.kernels = groups, kernels
        return kernels.grouped_product(x_RI, weight_EOI.transpose(1, 2), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RO):
        x_RI, weight_EOI = ctx.saved_tensors
        x_needed, weight_needed, *_ = gradients_needed(ctx)
        dx_RI = ctx.kernels.grouped_product(grad_RO, weight_EOI, ctx.groups) if x_needed else None
        dweight_EOI = None
        if weight_needed:
            product = partial(ctx.kernels.grouped_weight_gradient, grad_RO, x_RI, ctx.groups)
            dweight_EOI = weight_gradient(ctx, 1, weight_EOI, product)
        return dx_RI, dweight_EOI, None, None
