"""FP8 products on Hopper GPUs.

    quantise            our Triton kernels (train/kernels/fp8/triton_quantize.py)
    dense products      torch's blockwise scaled_mm (cuBLASLt): 1x128 by 128x128 and 1x128 by 1x128
    added to a sum      our Triton kernels or DeepGEMM (train/kernels/fp8/grouped_products.py): scaled_mm cannot
    grouped products    the same

What is missing or too old is an error that names it; nothing falls back.  Granularities that the kernels lack (row,
tensor, 128x128 on the left) are written as the tiles that hold the same scales, so that ablations run on the same kernels.

Operands are padded with zeros to multiples of 128, rows by the kernels that quantise.  A trap: cuBLASLt reads the scales of a 128x128 operand with their
number along the contraction rounded up to a multiple of 4.

Shape suffixes: O outer, C contraction, P rows of experts (train/kernels/fp8/groups.py), E experts, N outer of the right operand.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.errors import UserError
from conf.schema import FP8_OPERANDS, Fp8, Fp8Backend
from train.kernels.fp8 import swiglu
from train.kernels.fp8.cast_rules import OperandRule
from train.kernels.fp8.engines import RoundedTensor, Source
from train.kernels.fp8.formats import E4M3, TILE, Cast
from train.kernels.fp8.grouped_products import GroupedProducts, PaddedOperand
from train.kernels.fp8.groups import PaddedGroups
from train.kernels.fp8.quantize import QuantizedTensor, dequantize, dequantize_reference, quantize_reference
from train.kernels.gpu.fused_kernels import FusedKernels
from train.kernels.plain import grouped


class HopperEngine:
    """`train.kernels.fp8.engines.Fp8Engine` on a Hopper GPU; see train/kernels/fp8/gpu_engine.py."""

    def __init__(self, kernels: Any, products: GroupedProducts, scaled_mm: Callable[..., Tensor] = F.scaled_mm):
        """kernels: train.kernels.fp8.triton_quantize. products: of whichever library."""
        self._casts, self._products, self._scaled_mm = kernels, products, scaled_mm

    def keep(self, x_MK: Tensor, cast: Cast) -> QuantizedTensor:
        if cast.block != (1, TILE):
            return quantize_reference(x_MK, cast)
        quantize = self._casts.quantize_e5m6 if cast.format.dtype is None else self._casts.quantize_tiles
        q, scale = quantize(_padded_columns(x_MK), cast)
        return QuantizedTensor(q, scale, cast, x_MK.shape)

    cast = keep

    def take_arrived(self, q_MK: Tensor, scale: Tensor, cast: Cast) -> QuantizedTensor:
        q = _padded_columns(q_MK.view(torch.uint8)).view(q_MK.dtype)
        return QuantizedTensor(q, _by_column(scale), cast, q_MK.shape)

    def operand(
        self, source: Source, rule: OperandRule, transposed: bool = False, groups: PaddedGroups | None = None
    ) -> PaddedOperand | Tensor:
        assert not isinstance(source, RoundedTensor), "that is the CPU's"
        scale = None
        if isinstance(source, QuantizedTensor):
            outer, inner = source.shape[-2:]
            in_tiles, packed = source.cast.block == (1, TILE), source.cast.format.dtype is None
            kernel_layout = in_tiles and (not packed or (transposed and rule.granularity == "1x128"))
            if kernel_layout and rule.format is not None and not transposed and source.cast == rule.cast():
                return PaddedOperand(source.q, source.scale, True, outer)
            if kernel_layout and rule.format is not None:
                source, scale = source.q, source.scale
            elif in_tiles and packed and source.cast.pow2:
                source = self._casts.decode_e5m6(source.q, source.scale, outer)[:, :inner]
            else:
                source = dequantize(source)[..., :outer, :inner]
        else:
            outer, inner = source.shape[-2:]
        if rule.format is None:
            return source.bfloat16().mT if transposed else source.bfloat16()
        if source.dim() == 3:
            check_expert_sizes(source)
        return self._quantized(source, scale, rule, transposed, groups, inner if transposed else outer)

    def cast_again(self, x_MK: Tensor, kept: Cast, rule: OperandRule) -> PaddedOperand | Tensor:
        if rule.granularity != "1x128" or kept.block != (1, TILE) or rule.format is not kept.format:
            return self.operand(self.cast(x_MK, kept), rule, transposed=True)
        made = self._casts.quantize_again(_padded_columns(x_MK), kept, rule.cast(transposed=True))
        return _operand(made, True, x_MK.shape[1])

    def gradient(
        self, dy: Source, for_inputs: OperandRule, for_weights: OperandRule, groups: PaddedGroups | None = None
    ) -> tuple[PaddedOperand | Tensor, PaddedOperand | Tensor]:
        rules = for_inputs, for_weights
        apart = groups is not None and self._products.flat
        if (
            apart
            or not isinstance(dy, Tensor)
            or any(rule.format is None or rule.granularity != "1x128" for rule in rules)
        ):
            return self.operand(dy, for_inputs), self.operand(dy, for_weights, transposed=True, groups=groups)
        casts = for_inputs.cast(), for_weights.cast(transposed=True)
        ends_E = None if groups is None else groups.unpadded_ends_E
        rows, columns = self._casts.quantize_both(_padded_columns(dy), *casts, ends_E)
        return _operand(rows, True, dy.shape[0]), _operand(columns, True, dy.shape[1])

    def _quantized(
        self,
        x: Tensor,
        scale: Tensor | None,
        rule: OperandRule,
        transposed: bool,
        groups: PaddedGroups | None,
        outer: int,
    ) -> PaddedOperand:
        """Operand of a tensor, FP8 with tiles of the last dimension where a scale is given, its columns padded then."""
        cast, casts = rule.cast(transposed), self._casts
        flat = groups.padded if groups is not None and self._products.flat else None
        if rule.granularity == "1x128":
            x = _padded_columns(x) if scale is None else x
            if not transposed:
                return _operand(casts.quantize_tiles(x, cast, scale), True, outer)
            ends_E = None if groups is None else groups.unpadded_ends_E
            return _operand(casts.quantize_columns(x, cast, scale, flat, ends_E), True, outer)
        if scale is not None:
            x = dequantize_reference(QuantizedTensor(x, scale, Cast(E4M3, (1, TILE), False), x.shape))
        x = _padded(x)
        if rule.granularity == "128x128" and groups is None:
            return _operand(casts.quantize_blocks(x, cast, transposed), False, outer)
        return _expanded(x, cast, transposed, flat, outer)

    def groups(self, counts_E: Tensor, rows: int, in_tiles: bool = True) -> PaddedGroups:
        return PaddedGroups(counts_E) if self._products.counted else PaddedGroups(counts_E, rows, padded=not in_tiles)

    def product(
        self,
        left: PaddedOperand | Tensor,
        right: PaddedOperand | Tensor,
        dtype: torch.dtype,
        into: Tensor | None = None,
    ) -> Tensor:
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            return FusedKernels().product(left, right, dtype, into)
        assert isinstance(left, PaddedOperand) and isinstance(right, PaddedOperand)
        if into is not None:
            self._products.wgrad(_tiled(left), _tiled(right), None, into.unsqueeze(0), added=True)
            return into
        if right.tiles:
            columns, right_scale, recipe = right.q.t(), right.scale, F.ScalingType.BlockWise1x128
        else:
            (columns, right_scale), recipe = right.columns, F.ScalingType.BlockWise128x128
        out = self._scaled_mm(
            left.q,
            columns,
            scale_a=_tiled(left).scale,
            scale_recipe_a=F.ScalingType.BlockWise1x128,
            scale_b=right_scale,
            scale_recipe_b=recipe,
            output_dtype=dtype,
        )
        if out.shape == (left.outer, right.outer):
            return out
        return out[: left.outer, : right.outer].contiguous()

    def grouped(
        self, left: PaddedOperand | Tensor, right: PaddedOperand | Tensor, groups: PaddedGroups, dtype: torch.dtype
    ) -> Tensor:
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            return grouped.product_to_ends(left, right.mT, groups.ends_E).to(dtype)
        assert isinstance(left, PaddedOperand) and isinstance(right, PaddedOperand)
        if groups.rows == 0:
            return left.q.new_empty(0, right.outer, dtype=dtype)
        return self._products.grouped(_tiled(left), right, groups).to(dtype)

    def grouped_wgrad(
        self,
        left: PaddedOperand | Tensor,
        right: PaddedOperand | Tensor,
        groups: PaddedGroups,
        dtype: torch.dtype,
        into: Tensor | None = None,
    ) -> Tensor:
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            return FusedKernels().grouped_weight_gradient(left.mT, right.mT, groups.ends_E, dtype, into)
        assert isinstance(left, PaddedOperand) and isinstance(right, PaddedOperand)
        if groups.rows == 0 and into is None:
            return left.q.new_zeros(len(groups.ends_E), left.outer, right.outer, dtype=dtype)
        out_EON = into
        if out_EON is None:
            out_EON = left.q.new_empty(len(groups.ends_E), left.outer, right.outer, dtype=dtype)
        if groups.rows:
            self._products.wgrad(left, right, groups, out_EON, added=into is not None)
        return out_EON

    def swiglu(
        self, h_P2F: Tensor, gates_P: Tensor, rule: OperandRule, cache: Cast | None
    ) -> tuple[PaddedOperand | Tensor, Source]:
        if rule.format is None or rule.granularity != "1x128":
            made, kept = self.operand(swiglu.forward(h_P2F, gates_P), rule), None
        else:
            one_pass = cache is not None and cache.block == (1, TILE) and cache.format.dtype is not None
            tiles, kept = self._casts.swiglu_tiles(h_P2F, gates_P, rule.cast(), cache if one_pass else None)
            made = _operand(tiles, True, h_P2F.shape[0])
        if kept is not None and cache is not None:
            q, scale = kept
            return made, QuantizedTensor(q, scale, cache, h_P2F.shape)
        return made, h_P2F if cache is None else self.keep(h_P2F, cache)

    def swiglu_backward(self, h: Source, gates_P: Tensor, da_PF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = None
        if isinstance(h, QuantizedTensor):
            h, scale = h.q, h.scale
        return self._casts.swiglu_backward(h, gates_P, da_PF, scale)

    def recompute_swiglu(self, h: Source, gates_P: Tensor) -> Tensor:
        # the same kernel, so the same bits; what it also computes from the zeros is not used
        da_PF = gates_P.new_zeros(h.shape[0], h.shape[1] // 2, dtype=torch.bfloat16)
        return self.swiglu_backward(h, gates_P, da_PF)[0]


def needs_deep_gemm(fp8: Fp8) -> bool:
    """Whether DeepGEMM has a part in the products."""
    return fp8.backend == Fp8Backend.deepgemm


def has_mx_tiles(fp8: Fp8) -> bool:
    """Whether an operand has a scale for 32 values, as Blackwell's products take them."""
    return any("/1x32/" in getattr(fp8, name) for name in FP8_OPERANDS)


def check_gpu_operands(fp8: Fp8) -> None:
    """No product takes E5M2, none takes tiles of 32 beside others, and those of experts on Hopper take weights in blocks only. Raises UserError."""
    mx = has_mx_tiles(fp8)
    cure = f"use {'e4m3/1x32/pow2' if mx else 'e4m3/1x128/fp32'}"
    for name in FP8_OPERANDS:
        operand = getattr(fp8, name)
        if operand.startswith("e5m2"):
            rule = "must be e4m3 on CUDA: neither the products of experts nor blockwise torch.nn.functional.scaled_mm take another format"
            raise UserError(f"precision.fp8.{name}", operand, rule, cure)
        if mx and "/1x32/" not in operand:
            rule = "does not go on CUDA with tiles of 1x32, which Blackwell's products take on both sides, and Hopper's on neither"
            raise UserError(f"precision.fp8.{name}", operand, rule, cure)
    if mx and fp8.backend != Fp8Backend.triton:
        rule = "has no products of tiles of 1x32: those are torch's"
        raise UserError("precision.fp8.backend", fp8.backend, rule, "leave precision.fp8.backend at triton")
    if not mx and fp8.weight.split("/")[1] not in ("128x128", "tensor"):
        rule = "must be 128x128 or tensor on CUDA: the products of experts read weights in blocks"
        raise UserError("precision.fp8.weight", fp8.weight, rule, "use e4m3/128x128/fp32")


def check_expert_sizes(weight_ENK: Tensor) -> None:
    """Raises UserError for experts whose weights are no whole tiles."""
    for size in weight_ENK.shape[1:]:
        if size % TILE:
            raise UserError(
                "model.hidden, 2 x model.expert_width",
                size,
                "must be a multiple of 128 for FP8 experts on CUDA",
                "change the size, or run the experts in bf16",
            )


def _padded(x_RC: Tensor) -> Tensor:
    """Whole tiles, contiguous."""
    below, right = -x_RC.shape[-2] % TILE, -x_RC.shape[-1] % TILE
    return F.pad(x_RC, (0, right, 0, below)) if below or right else x_RC.contiguous()


def _operand(made: tuple[Tensor, Tensor], tiles: bool, outer: int) -> PaddedOperand:
    q, scale = made
    return PaddedOperand(q, scale, tiles, outer)


def _padded_columns(x_RC: Tensor) -> Tensor:
    """Columns of whole tiles, contiguous."""
    right = -x_RC.shape[-1] % TILE
    return F.pad(x_RC, (0, right)) if right else x_RC.contiguous()


def _tiled(x: PaddedOperand) -> PaddedOperand:
    """Scales per 128x128 (O / 128, C / 128) as scales per row and 128 columns, stored column by column."""
    return x if x.tiles else replace(x, scale=x.scale.t().repeat_interleave(TILE, 1).t(), tiles=True)


def _expanded(x: Tensor, cast: Cast, transposed: bool, flat: list[int] | None, outer: int) -> PaddedOperand:
    """An operand whose scales cover more than the kernels' blocks, written with each scale repeated. flat: rows of the
    experts whose matrices shall lie one after the other.
    """
    quantized = quantize_reference(x, cast)
    q, scale, (rows, columns) = quantized.q, quantized.scale, quantized.cast.block
    if transposed:
        q, scale, (rows, columns) = q.mT.contiguous(), scale.mT, (columns, rows)
    if x.dim() == 3:
        blocks = scale.expand(q.shape[0], q.shape[1] // TILE, q.shape[2] // TILE)
        return PaddedOperand(q, blocks.contiguous(), False, outer)
    row_O = torch.arange(q.shape[0], device=q.device) // rows
    column_C = torch.arange(0, q.shape[1], TILE, device=q.device) // columns
    tiles = _by_column(scale[row_O[:, None], column_C[None, :]])
    if flat is not None:
        q = torch.cat([part.flatten() for part in q.split(flat, 1)])
    return PaddedOperand(q, tiles, True, outer)


def _by_column(scale: Tensor) -> Tensor:
    """Scales (O, C / 128) stored column by column; the strides say so even where a size is 1."""
    return scale.new_empty(scale.shape[::-1]).copy_(scale.t()).t()
