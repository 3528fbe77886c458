"""MXFP8 GEMMs on Blackwell GPUs of compute capability 10. Values are E4M3, and 32 values along the contraction share an
E8M0 scale.

    quantise            Sluice's Triton kernel (`quantize_mx` of train/kernels/fp8/triton_quantize.py)
    dense GEMMs         torch's scaled_mm (cuBLASLt), 1x32 by 1x32
    grouped GEMMs       torch's scaled_grouped_mm (CUTLASS): each row times its expert's weight; in Wgrad, sums over
                        experts' rows

These GEMMs cannot add to a sum, so a separate addition accumulates weight gradients. Pitfalls of torch's grouped
kernels (2.11 to 2.13):
- The scales of each expert begin at a multiple of 128 rows, even if the expert's rows begin elsewhere.
- In Wgrad the scales of each expert form a separate matrix.
- The kernel does not write the gradient of an expert without rows. So Sluice gives such an expert a tile of zeros.

If the cast of a saved input has tiles of 128, the engine quantises this input as on Hopper. Shape suffixes: as in
train/kernels/fp8/hopper.py; T groups of four scales along the contraction.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from train.kernels.fp8.cast_rules import OperandRule
from train.kernels.fp8.engines import Source
from train.kernels.fp8.formats import MX_TILE, TILE, Cast
from train.kernels.fp8.groups import PaddedGroups
from train.kernels.fp8.hopper import HopperEngine, PaddedOperand, check_expert_sizes
from train.kernels.fp8.quantize import QuantizedTensor

_RECIPE = {
    "scale_recipe_a": F.ScalingType.BlockWise1x32,
    "scale_recipe_b": F.ScalingType.BlockWise1x32,
    "swizzle_a": F.SwizzleType.SWIZZLE_32_4_4,
    "swizzle_b": F.SwizzleType.SWIZZLE_32_4_4,
}


class ScaledGroupedMatmuls:
    """Implements `train.kernels.fp8.hopper.GroupedMatmuls` with torch's scaled_grouped_mm."""

    flat = counted = False

    def __init__(self, scaled_grouped_mm: Callable[..., Tensor]):
        self._scaled_grouped_mm = scaled_grouped_mm

    def grouped(self, left: PaddedOperand, right: PaddedOperand, groups: PaddedGroups) -> Tensor:
        scale = _scales_by_expert(left.scale, groups)
        return self._matmul(left.q[: groups.rows], right, scale, groups.ends_E)

    def wgrad(
        self, left: PaddedOperand, right: PaddedOperand, groups: PaddedGroups | None, out_EON: Tensor, added: bool
    ) -> None:
        assert groups is not None, "dense ones are scaled_mm's"
        made_EON = self._matmul(left.q, right, left.scale, groups.sum_ends_E)
        out_EON.add_(made_EON) if added else out_EON.copy_(made_EON)

    def _matmul(self, left: Tensor, right: PaddedOperand, scale: Tensor, ends_E: Tensor) -> Tensor:
        return self._scaled_grouped_mm(
            left, right.q.mT, scale_a=scale, scale_b=right.scale, **_RECIPE, offs=ends_E, output_dtype=torch.bfloat16
        )


class BlackwellEngine(HopperEngine):
    """Implements `train.kernels.fp8.engines.Fp8Engine` on a Blackwell GPU."""

    def keep(self, x_MK: Tensor, cast: Cast) -> QuantizedTensor:
        if cast.block != (1, MX_TILE):
            return super().keep(x_MK, cast)
        q, scale = self._casts.quantize_mx(x_MK, cast)
        return QuantizedTensor(q, scale, cast, x_MK.shape)

    cast = keep

    def values(self, source: QuantizedTensor) -> Tensor:
        if source.cast.block != (1, MX_TILE):
            return super().values(source)
        scale = _by_row(source.scale).view(source.scale.dtype).float()
        values = source.q.float() * scale.repeat_interleave(MX_TILE, 1)
        return values[: source.shape[0], : source.shape[1]].bfloat16()

    def operand(
        self, source: Source, rule: OperandRule, transposed: bool = False, groups: PaddedGroups | None = None
    ) -> PaddedOperand:
        x, scale = source, None
        if isinstance(source, QuantizedTensor):
            (rows, columns), tiles = source.shape, source.cast.block == (1, MX_TILE)
            if not transposed and source.cast == rule.cast():
                return PaddedOperand(source.q, source.scale, True, rows)
            if tiles and transposed:
                x, scale = source.q[:rows, :columns], source.scale
            else:
                x = self.values(source)
        assert isinstance(x, Tensor), "others are the CPU's"
        if x.dim() == 3:
            check_expert_sizes(x)
        x_OC, ends_E = x.mT if transposed else x, None if groups is None else groups.ends_E
        q, scale = self._casts.quantize_mx(x_OC, rule.cast(), scale, ends_E)
        return PaddedOperand(q, scale, True, x_OC.shape[-2])

    def matmul(
        self, left: PaddedOperand, right: PaddedOperand, dtype: torch.dtype, into: Tensor | None = None
    ) -> Tensor:
        scales = {"scale_a": left.scale, "scale_b": right.scale}
        made = self._scaled_mm(left.q, right.q.t(), **scales, **_RECIPE, output_dtype=dtype)
        made = made[: left.outer, : right.outer]
        return made.contiguous() if into is None else into.add_(made)

    def swiglu(self, h_P2F: Tensor, gates_P: Tensor, rule: OperandRule, cache: Cast) -> tuple[PaddedOperand, Source]:
        q, scale = self._casts.quantize_mx(h_P2F, rule.cast(), gates_R=gates_P)
        return PaddedOperand(q, scale, True, len(h_P2F)), self.keep(h_P2F, cache)


def _by_row(scale: Tensor) -> Tensor:
    """Converts scales from the GEMMs' order to row-major (O, T), four per int32."""
    tiles = scale.shape[1] // 4
    return scale.view(torch.int32).view(-1, tiles, TILE // 4, 4).permute(0, 3, 2, 1).reshape(-1, tiles)


def _scales_by_expert(scale: Tensor, groups: PaddedGroups) -> Tensor:
    """Returns the scales in the GEMMs' order; the scales of each expert begin at a multiple of 128 rows."""
    words_PT = groups.whole.pad(_by_row(scale)[: groups.rows])
    blocks = words_PT.view(-1, 4, TILE // 4, words_PT.shape[1]).permute(0, 3, 2, 1)
    return blocks.reshape(words_PT.shape).view(scale.dtype)
