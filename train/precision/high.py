"""Products in fp32 or bf16: the plain recipe. bf16 products accumulate in fp32 inside the kernels.

Shapes: D width, F inner width, E experts of this rank, R rows sorted by expert.
"""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from train.model.layers import recomputed_swiglu, swiglu


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
        h_R2F = F.grouped_mm(rows_RD, w13_E2FD.to(self.dtype).transpose(1, 2), offs=ends_E)
        a_RF = swiglu(h_R2F, gates_R)
        with recomputed_swiglu(a_RF, h_R2F, gates_R) if self._recompute_swiglu else nullcontext():
            return F.grouped_mm(a_RF, w2_EDF.to(self.dtype).transpose(1, 2), offs=ends_E)
