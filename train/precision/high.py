"""Products in fp32 or bf16: the plain recipe. bf16 products accumulate in fp32 inside the kernels.

Shapes: D width, F inner width, E experts of this rank, R rows sorted by expert; I inputs and O outputs of a product.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from train.model.layers import recomputed_swiglu, swiglu
from train.model.needed import gradients_needed
from train.precision.health import Report


class HighPrecision:
    """Products with operands in dtype, torch.float32 or torch.bfloat16.

    recompute_swiglu: whether experts make their SwiGLU output again in backward instead of keeping it.
    """

    def __init__(self, dtype: torch.dtype, recompute_swiglu: bool = True):
        self.dtype = dtype
        self._recompute_swiglu = recompute_swiglu

    def linear(self, x: Tensor, weight: Tensor, kind: str = "dense") -> Tensor:
        return F.linear(x, weight.to(self.dtype))

    def expert_ffn(
        self, rows_RD: Tensor, gates_R: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, counts_E: Tensor
    ) -> Tensor:
        ends_E = counts_E.cumsum(0).to(torch.int32)
        h_R2F = _GroupedProduct.apply(rows_RD, w13_E2FD.to(self.dtype), ends_E)
        a_RF = swiglu(h_R2F, gates_R)
        with recomputed_swiglu(a_RF, h_R2F, gates_R) if self._recompute_swiglu else nullcontext():
            return _GroupedProduct.apply(a_RF, w2_EDF.to(self.dtype), ends_E)

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
    def forward(ctx, x_RI, weight_EOI, ends_E):
        ctx.save_for_backward(x_RI, weight_EOI, ends_E)
        return F.grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RO):
        x_RI, weight_EOI, ends_E = ctx.saved_tensors
        x_needed, weight_needed, _ = gradients_needed(ctx)
        dx_RI = F.grouped_mm(grad_RO, weight_EOI, offs=ends_E) if x_needed else None
        dweight_EOI = F.grouped_mm(grad_RO.t(), x_RI, offs=ends_E) if weight_needed else None
        return dx_RI, dweight_EOI, None
