"""Computes the model's matmuls in fp32, or in bf16 with fp32 sums, with `Kernels` (train/model/operations.py).

Shapes: D width, F inner width, E experts of this rank, R rows sorted by expert.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from train.kernels.fp8.health import Report
from train.model.layers import AddedMatmul, HeldInput, recomputed_swiglu, swiglu
from train.model.operations import Kernels
from train.model.weight_gradient import GroupedMatmul


class HighPrecision:
    """`LayerPrecision` with operands in `dtype`, torch.float32 or torch.bfloat16.

    recompute_swiglu: whether backward recomputes the experts' SwiGLU output.
    """

    def __init__(self, dtype: torch.dtype, kernels: Kernels, recompute_swiglu: bool = True):
        self.dtype, self.kernels = dtype, kernels
        self._recompute_swiglu = recompute_swiglu

    def linear(self, x: Tensor, weight: Tensor, kind: str = "dense", held: HeldInput | None = None) -> Tensor:
        return self.kernels.linear(x, weight.to(self.dtype))

    def hold(self, x: Tensor, kind: str) -> None:
        """Returns None, because `linear` saves its input unchanged."""

    def expert_ffn(
        self,
        rows_RD: Tensor,
        gates_R: Tensor,
        w13_E2FD: Tensor,
        w2_EDF: Tensor,
        counts_E: Tensor,
        added: tuple[AddedMatmul | None, AddedMatmul | None] = (None, None),
    ) -> Tensor:
        (up, down), kernels, groups = added, self.kernels, self.kernels.groups(counts_E, self.dtype)
        h_R2F = GroupedMatmul.apply(rows_RD, w13_E2FD.to(self.dtype), groups, kernels)
        if up is not None:
            h_R2F = up.add(h_R2F, rows_RD, groups)
        a_RF = swiglu(h_R2F, gates_R, kernels)
        with recomputed_swiglu(a_RF, h_R2F, gates_R, kernels) if self._recompute_swiglu else nullcontext():
            y_RD = GroupedMatmul.apply(a_RF, w2_EDF.to(self.dtype), groups, kernels)
            return y_RD if down is None else down.add(y_RD, a_RF, groups)

    def watch(self, model: nn.Module) -> None:
        """Does nothing, because nothing is quantised."""

    def start_step(self, step: int, hold_weights: bool = False) -> None:
        """Does nothing, because nothing is quantised."""

    def end_passes(self) -> None:
        """Does nothing, because no casts are stored."""

    def health(self) -> Report:
        """Returns an empty report, because nothing is quantised."""
        return Report({}, {}, [])
