"""Products of experts, and products added to a gradient, on a Hopper GPU by one of two libraries (`precision.fp8.backend`).

    TritonProducts      our kernels (train/kernels/fp8/triton_products.py), with torch and triton alone
    DeepGemmProducts    DeepGEMM's: M-grouped 1x128 by 128x128 (Fprop, Dgrad), K-grouped 1x128 by 1x128 (Wgrad, fp32)

Three things are traps in DeepGEMM.  Its K-grouped kernel wants each expert's operand as a matrix of its own, one after the
other; it wants a C operand, and leaves the result of an expert without rows unwritten; and it transposes scales of tiles that are
stored row by row with a kernel that it compiles for each width, which for Wgrad means for every number of rows, and whose
shared memory ends at 116,000 rows.  Column by column, as here, both libraries take them as they are.

Shape suffixes: O, N outer, C contraction, P rows as they take them, E experts.
"""

import importlib
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.errors import UserError
from train.kernels.fp8.formats import TILE
from train.kernels.fp8.groups import PaddedGroups, on_device
from train.kernels.fp8.installed import DEEP_GEMM, WITHOUT_PACKAGES, require_fit, version


@dataclass(frozen=True)
class PaddedOperand:
    """A quantised operand in the layout of the kernels, sizes padded to multiples of 128."""

    q: Tensor
    """(..., O, C); in a K-grouped product of DeepGEMM flat, one (O, rows of the expert) matrix after the other."""
    scale: Tensor
    """Tiles: (O, C / 128) stored column by column. Blocks: (..., O / 128, C / 128), contiguous.
    MXFP8: as `quantize_mx` of train/kernels/fp8/triton_quantize.py gives it."""
    tiles: bool
    """One scale per row and 128 of the contraction, or 32; otherwise one per 128x128."""
    outer: int
    """O without the padding."""

    @cached_property
    def columns(self) -> tuple[Tensor, Tensor]:
        """q and scales of blocks as cuBLASLt reads a right operand: (C, O), and (C / 128 to a multiple of 4, O / 128)."""
        right = -self.scale.shape[1] % 4  # none in most sizes, where a pad would be a copy
        return self.q.t(), (F.pad(self.scale, (0, right), value=1.0) if right else self.scale).t()


class GroupedProducts(Protocol):
    """Both kinds of grouped products. Rows are those of `PaddedGroups`, and there are some."""

    flat: bool
    """Whether operands of `wgrad` lie one expert's matrix after the other."""
    counted: bool
    """Whether the host must know how many rows each expert has."""

    def grouped(self, left: PaddedOperand, right: PaddedOperand, groups: PaddedGroups) -> Tensor:
        """left (P, C or more rows) in tiles, right (E, N, C) in blocks: (P, N) in bf16."""

    def wgrad(
        self, left: PaddedOperand, right: PaddedOperand, groups: PaddedGroups | None, out_EON: Tensor, added: bool
    ) -> None:
        """left (O, P), right (N, P), both in tiles: fill out_EON (bf16 or fp32), or add to it (fp32). groups: None where
        all rows are summed into one matrix.
        """


class TritonProducts:
    """By our kernels."""

    flat = counted = False

    def __init__(self, kernels: Any):
        """kernels: their module."""
        self._kernels = kernels

    def grouped(self, left: PaddedOperand, right: PaddedOperand, groups: PaddedGroups) -> Tensor:
        out_PN = left.q.new_empty(groups.rows, right.outer, dtype=torch.bfloat16)
        if groups.slots_R is not None:
            out_PN.zero_()  # no program writes behind the last expert
        return self._kernels.product(left.q, left.scale, right.q, right.scale, out_PN, groups.ends_E)

    def wgrad(
        self, left: PaddedOperand, right: PaddedOperand, groups: PaddedGroups | None, out_EON: Tensor, added: bool
    ) -> None:
        ends_E = None if groups is None else groups.ends_E
        self._kernels.wgrad(left.q, left.scale, right.q, right.scale, out_EON, added, ends_E)


class DeepGemmProducts:
    """By the module deep_gemm."""

    flat = counted = True

    def __init__(self, deep_gemm: Any):
        self._deep_gemm = deep_gemm

    def grouped(self, left: PaddedOperand, right: PaddedOperand, groups: PaddedGroups) -> Tensor:
        out_PN = left.q.new_empty(groups.rows, right.outer, dtype=torch.bfloat16)
        counts = on_device(groups.padded, out_PN.device)
        experts = torch.arange(len(groups.padded), dtype=torch.int32, device=out_PN.device)
        expert_P = experts.repeat_interleave(counts, output_size=groups.rows)
        self._deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
            (left.q, left.scale),
            (right.q, right.scale),
            out_PN,
            expert_P,
            recipe_a=(1, TILE),
            recipe_b=(TILE, TILE),
            disable_ue8m0_cast=True,
        )
        return out_PN

    def wgrad(
        self, left: PaddedOperand, right: PaddedOperand, groups: PaddedGroups | None, out_EON: Tensor, added: bool
    ) -> None:
        rows = [left.q.shape[1]] if groups is None else groups.padded
        sum_EON = out_EON if added else torch.zeros_like(out_EON, dtype=torch.float32)
        self._deep_gemm.k_grouped_fp8_gemm_nt_contiguous(
            (left.q.flatten(), left.scale),
            (right.q.flatten(), right.scale),
            sum_EON,
            rows,
            on_device(rows, out_EON.device, torch.int32),
            sum_EON,
            recipe=(1, 1, TILE),
        )
        if not added:
            out_EON.copy_(sum_EON)


def load_deep_gemm() -> ModuleType:
    """DeepGEMM, of a version that has the kernels and fits the torch that is there."""
    require_fit(deep_gemm=True)
    try:
        return importlib.import_module("deep_gemm")
    except (ImportError, OSError, AssertionError) as error:  # an assertion where it finds no CUDA toolkit
        rule = f"{DEEP_GEMM} {version(DEEP_GEMM)} cannot be loaded: {error!r}"
        raise UserError("precision", "fp8", rule, WITHOUT_PACKAGES) from error
