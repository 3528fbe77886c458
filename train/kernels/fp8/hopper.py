"""FP8 GEMMs on Hopper GPUs: operands in tiles of 1x128, weights in blocks of 128x128.

    quantise            Sluice's Triton kernels (train/kernels/fp8/triton_quantize.py)
    dense GEMMs         torch's blockwise scaled_mm (cuBLASLt): 1x128 by 128x128 and 1x128 by 1x128
    grouped GEMMs, and GEMMs added to a sum, which scaled_mm lacks: one of two libraries (`precision.fp8.backend`)
      TritonMatmuls    Sluice's kernels (train/kernels/fp8/triton_matmuls.py), which need only torch and triton
      DeepGemmMatmuls  DeepGEMM's: M-grouped 1x128 by 128x128 (Fprop, Dgrad), K-grouped 1x128 by 1x128 (Wgrad, fp32)

The quantisation kernels pad operands with zero rows to multiples of 128. Pitfalls of the libraries:
- For a 128x128 operand, cuBLASLt expects a multiple of 4 scales along the contraction. So Sluice pads these scales.
- DeepGEMM's K-grouped kernel reads each expert's operand as a separate matrix. It needs a C operand, and does not write
  the result of an expert without rows.
- If tile scales are stored row by row, DeepGEMM transposes them. In Wgrad it then compiles a kernel for each number of
  rows, which fails above 116,000 rows. So Sluice stores scales column by column.

Shape suffixes: O outer, C contraction, P rows of experts (train/kernels/fp8/groups.py), E experts, N outer of the right
operand.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.errors import UserError
from conf.schema import FP8_OPERANDS, Fp8, Fp8Backend
from train.kernels.fp8.cast_rules import OperandRule
from train.kernels.fp8.engines import RoundedTensor, Source
from train.kernels.fp8.formats import TILE, Cast
from train.kernels.fp8.groups import PaddedGroups, on_device
from train.kernels.fp8.installed import DEEP_GEMM, WITHOUT_PACKAGES, require_fit, version
from train.kernels.fp8.quantize import QuantizedTensor, dequantize


@dataclass(frozen=True)
class PaddedOperand:
    """A quantised operand, padded to multiples of 128."""

    q: Tensor
    """Codes (..., O, C). For DeepGEMM's K-grouped GEMM: flat matrices (O, expert's rows), one after another."""
    scale: Tensor
    """Scales. Tiles: (O, C / 128), stored column by column. Blocks: (..., O / 128, C / 128), contiguous."""
    tiles: bool
    """Whether scales are per row and 128 (or 32) elements of C, not per 128x128 block."""
    outer: int
    """The size O without padding."""

    @cached_property
    def columns(self) -> tuple[Tensor, Tensor]:
        """Codes (C, O) and scales of cuBLASLt's right operand: (C / 128, O / 128), with a multiple of 4 along C."""
        right = -self.scale.shape[1] % 4  # zero for most shapes, which then need no copy
        return self.q.t(), (F.pad(self.scale, (0, right), value=1.0) if right else self.scale).t()


class GroupedMatmuls(Protocol):
    """The two kinds of grouped GEMMs, on operands with at least one row."""

    flat: bool
    """Whether an operand of `wgrad` is flat: one matrix per expert, one after another."""
    counted: bool
    """Whether the host must know each expert's number of rows."""

    def grouped(self, left: PaddedOperand, right: PaddedOperand, groups: PaddedGroups) -> Tensor:
        """Multiplies the rows of left (P, C) by their expert's transposed matrix in right (E, N, C). Returns (P, N) in
        bf16.

        left is quantised in tiles and may have more rows than the result. right is quantised in blocks.
        """

    def wgrad(
        self, left: PaddedOperand, right: PaddedOperand, groups: PaddedGroups | None, out_EON: Tensor, added: bool
    ) -> None:
        """Multiplies left (O, P) by the transpose of right (N, P), separately for the columns of each expert. Both are
        in tiles.

        out_EON: is overwritten (bf16 or fp32), or if `added`, added to (fp32).
        groups: None if all columns are summed into one matrix.
        """


class TritonMatmuls:
    """Grouped GEMMs with Sluice's Triton kernels."""

    flat = counted = False

    def __init__(self, kernels: Any):
        """kernels: the module train.kernels.fp8.triton_matmuls."""
        self._kernels = kernels

    def grouped(self, left: PaddedOperand, right: PaddedOperand, groups: PaddedGroups) -> Tensor:
        out_PN = left.q.new_empty(groups.rows, right.outer, dtype=torch.bfloat16)
        return self._kernels.matmul(left.q, left.scale, right.q, right.scale, out_PN, groups.ends_E)

    def wgrad(
        self, left: PaddedOperand, right: PaddedOperand, groups: PaddedGroups | None, out_EON: Tensor, added: bool
    ) -> None:
        ends_E = None if groups is None else groups.ends_E
        self._kernels.wgrad(left.q, left.scale, right.q, right.scale, out_EON, added, ends_E)


class DeepGemmMatmuls:
    """Grouped GEMMs with the package DeepGEMM (module deep_gemm)."""

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
    """Imports DeepGEMM. Raises UserError unless it has the needed kernels and fits torch."""
    require_fit(deep_gemm=True)
    try:
        return importlib.import_module("deep_gemm")
    except (ImportError, OSError, AssertionError) as error:  # DeepGEMM asserts that a CUDA toolkit exists
        rule = f"{DEEP_GEMM} {version(DEEP_GEMM)} cannot be loaded: {error!r}"
        raise UserError("precision", "fp8", rule, WITHOUT_PACKAGES) from error


class HopperEngine:
    """Implements `train.kernels.fp8.engines.Fp8Engine` on a Hopper GPU."""

    def __init__(self, kernels: Any, matmuls: GroupedMatmuls, scaled_mm: Callable[..., Tensor] = F.scaled_mm):
        """kernels: the module train.kernels.fp8.triton_quantize.
        matmuls: grouped GEMMs.
        scaled_mm: torch's dense GEMM.
        """
        self._casts, self._matmuls, self._scaled_mm = kernels, matmuls, scaled_mm

    def keep(self, x_MK: Tensor, cast: Cast) -> QuantizedTensor:
        cast_rows = self._casts.quantize_e5m6 if cast.format.dtype is None else self._casts.quantize_tiles
        q, scale = cast_rows(_padded_columns(x_MK), cast)
        return QuantizedTensor(q, scale, cast, x_MK.shape)

    cast = keep

    def take_arrived(self, q_MK: Tensor, scale: Tensor, cast: Cast) -> QuantizedTensor:
        q = _padded_columns(q_MK.view(torch.uint8)).view(q_MK.dtype)
        columns = scale.new_empty(scale.shape[::-1]).copy_(scale.t())  # stored column by column, even if a size is 1
        return QuantizedTensor(q, columns.t(), cast, q_MK.shape)

    def values(self, source: QuantizedTensor) -> Tensor:
        outer, inner = source.shape
        if source.cast.format.dtype is None and source.cast.pow2:
            return self._casts.decode_e5m6(source.q, source.scale, outer)[:, :inner]
        return dequantize(source, torch.bfloat16)[:outer, :inner]

    def operand(
        self, source: Source, rule: OperandRule, transposed: bool = False, groups: PaddedGroups | None = None
    ) -> PaddedOperand:
        assert not isinstance(source, RoundedTensor), "that is the CPU's"
        (outer, inner), scale = source.shape[-2:], None
        if isinstance(source, QuantizedTensor):
            if not transposed and source.cast == rule.cast():
                return PaddedOperand(source.q, source.scale, True, outer)
            x, scale = source.q, source.scale
        else:
            x = _padded_columns(source)
        if x.dim() == 3:
            check_expert_sizes(source)
        cast = rule.cast(transposed)
        if rule.granularity == "128x128":
            below = -outer % TILE
            x = F.pad(x, (0, 0, 0, below)) if below else x
            return _operand(self._casts.quantize_blocks(x, cast, transposed), False, inner if transposed else outer)
        if not transposed:
            assert scale is None, "what is kept in another cast is for Wgrad"
            return _operand(self._casts.quantize_tiles(x, cast), True, outer)
        flat = groups.padded if groups is not None and self._matmuls.flat else None
        ends_E = None if groups is None else groups.unpadded_ends_E
        return _operand(self._casts.quantize_columns(x, cast, scale, flat, ends_E), True, inner)

    def cast_again(self, x_MK: Tensor, kept: Cast, rule: OperandRule) -> PaddedOperand:
        if kept.block != (1, TILE) or rule.granularity != "1x128" or rule.format is not kept.format:
            return self.operand(self.cast(x_MK, kept), rule, transposed=True)
        made = self._casts.quantize_again(_padded_columns(x_MK), kept, rule.cast(transposed=True))
        return _operand(made, True, x_MK.shape[1])

    def gradient(
        self, dy: Source, for_inputs: OperandRule, for_weights: OperandRule, groups: PaddedGroups | None = None
    ) -> tuple[PaddedOperand, PaddedOperand]:
        apart = for_inputs.granularity != "1x128" or (groups is not None and self._matmuls.flat)
        if apart or not isinstance(dy, Tensor):
            return self.operand(dy, for_inputs), self.operand(dy, for_weights, transposed=True, groups=groups)
        casts = for_inputs.cast(), for_weights.cast(transposed=True)
        ends_E = None if groups is None else groups.unpadded_ends_E
        rows, columns = self._casts.quantize_both(_padded_columns(dy), *casts, ends_E)
        return _operand(rows, True, dy.shape[0]), _operand(columns, True, dy.shape[1])

    def groups(self, counts_E: Tensor, rows: int) -> PaddedGroups:
        return PaddedGroups(counts_E) if self._matmuls.counted else PaddedGroups(counts_E, rows, padded=False)

    def matmul(
        self, left: PaddedOperand, right: PaddedOperand, dtype: torch.dtype, into: Tensor | None = None
    ) -> Tensor:
        if into is not None:
            self._matmuls.wgrad(left, right, None, into.unsqueeze(0), added=True)
            return into
        columns, scale = (right.q.t(), right.scale) if right.tiles else right.columns
        out = self._scaled_mm(
            left.q,
            columns,
            scale_a=left.scale,
            scale_recipe_a=F.ScalingType.BlockWise1x128,
            scale_b=scale,
            scale_recipe_b=F.ScalingType.BlockWise1x128 if right.tiles else F.ScalingType.BlockWise128x128,
            output_dtype=dtype,
        )
        return out[: left.outer, : right.outer].contiguous()

    def grouped(self, left: PaddedOperand, right: PaddedOperand, groups: PaddedGroups, dtype: torch.dtype) -> Tensor:
        if groups.rows == 0:
            return left.q.new_empty(0, right.outer, dtype=dtype)
        return self._matmuls.grouped(left, right, groups).to(dtype)

    def grouped_wgrad(
        self,
        left: PaddedOperand,
        right: PaddedOperand,
        groups: PaddedGroups,
        dtype: torch.dtype,
        into: Tensor | None = None,
    ) -> Tensor:
        made = left.q.new_empty if groups.rows else left.q.new_zeros
        out_EON = made(len(groups.ends_E), left.outer, right.outer, dtype=dtype) if into is None else into
        if groups.rows:
            self._matmuls.wgrad(left, right, groups, out_EON, added=into is not None)
        return out_EON

    def swiglu(self, h_P2F: Tensor, gates_P: Tensor, rule: OperandRule, cache: Cast) -> tuple[PaddedOperand, Source]:
        tiles, (q, scale) = self._casts.swiglu_tiles(h_P2F, gates_P, rule.cast(), cache)
        return _operand(tiles, True, len(h_P2F)), QuantizedTensor(q, scale, cache, h_P2F.shape)

    def swiglu_backward(self, h: Source, gates_P: Tensor, da_PF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert isinstance(h, QuantizedTensor), "as `swiglu` keeps it"
        return self._casts.swiglu_backward(h.q, gates_P, da_PF, h.scale)

    def recompute_swiglu(self, h: Source, gates_P: Tensor) -> Tensor:
        # The same kernel gives the same bits of `a`. Its other results depend on da, which is zero, and are ignored.
        da_PF = gates_P.new_zeros(h.shape[0], h.shape[1] // 2, dtype=torch.bfloat16)
        return self.swiglu_backward(h, gates_P, da_PF)[0]


def needs_deep_gemm(fp8: Fp8) -> bool:
    """Returns whether the recipe uses DeepGEMM."""
    return fp8.backend == Fp8Backend.deepgemm


def has_mx_tiles(fp8: Fp8) -> bool:
    """Returns whether an operand has one scale per 32 values, as only Blackwell supports."""
    return any("/1x32/" in getattr(fp8, name) for name in FP8_OPERANDS)


def check_gpu_operands(fp8: Fp8) -> None:
    """Check that a GPU supports the operands of a recipe. Raises UserError.

    All operands must be E4M3. Hopper needs 128x128 blocks for weights, and 1x128 tiles for other operands. Blackwell
    needs 1x32 tiles.
    """
    mx = has_mx_tiles(fp8)
    for name in FP8_OPERANDS:
        operand = getattr(fp8, name)
        wanted = "1x32" if mx else "128x128" if name == "weight" else "1x128"
        if not operand.startswith(f"e4m3/{wanted}/"):
            rule = f"must be e4m3/{wanted} on CUDA, whose kernels support no other operand here; a CPU emulates all operands"
            raise UserError(
                f"precision.fp8.{name}",
                operand,
                rule,
                f"use e4m3/{wanted}/{'pow2' if mx else 'fp32'}, or cluster.device=cpu",
            )
    if mx and fp8.backend != Fp8Backend.triton:
        rule = "has no GEMMs for tiles of 1x32; torch has them"
        raise UserError("precision.fp8.backend", fp8.backend, rule, "set precision.fp8.backend=triton")


def check_expert_sizes(weight_ENK: Source) -> None:
    """Raises UserError if a size of the experts' weights is no multiple of 128."""
    for size in weight_ENK.shape[1:]:
        if size % TILE:
            raise UserError(
                "model.hidden, 2 x model.expert_width",
                size,
                "must be a multiple of 128 for FP8 experts on CUDA",
                "change the size, or run the experts in bf16",
            )


def _operand(made: tuple[Tensor, Tensor], tiles: bool, outer: int) -> PaddedOperand:
    return PaddedOperand(*made, tiles, outer)


def _padded_columns(x_RC: Tensor) -> Tensor:
    """Returns x, contiguous, with columns padded to a multiple of 128."""
    right = -x_RC.shape[-1] % TILE
    return F.pad(x_RC, (0, right)) if right else x_RC.contiguous()
