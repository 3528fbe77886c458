"""Emulates FP8 on a CPU with compiled matmuls, which read an operand's values and fp32 scales from separate tensors.

bf16 represents the FP8 values exactly, so a matmul costs as much as in bf16 (train/kernels/cpu/products.cpp). If the
scales are powers of two, the bf16 values already include the scales.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from train.kernels.cpu.compiled_matmuls import NO_SCALES, Part, parts_by_rows, parts_by_sums, run_matmuls
from train.kernels.cpu.cpp_build import load_library
from train.kernels.cpu.libraries import source
from train.kernels.fp8 import swiglu
from train.kernels.fp8.cast_rules import OperandRule
from train.kernels.fp8.compiled_casts import CompiledCasts
from train.kernels.fp8.cpu_engine import CpuEngine
from train.kernels.fp8.engines import RoundedTensor, Source
from train.kernels.fp8.formats import TILE, Cast
from train.kernels.fp8.groups import PaddedGroups
from train.kernels.fp8.quantize import QuantizedTensor, fitted
from train.model.operations import Kernels

ScaledOperand = Tensor | QuantizedTensor
"""An operand (O, C): a `QuantizedTensor` of bf16 values, or bf16."""


class CompiledEngine(CpuEngine):
    """Computes what `CpuEngine` computes, but adds in another order. Accepts only CPU and meta tensors.

    It never multiplies an operand by fp32 scales before a matmul, because bf16 cannot hold the product.
    """

    def __init__(self, casts: CompiledCasts, kernels: Kernels):
        super().__init__(casts)
        self._compiled, self._plain_too = casts, "products" in kernels.parts

    def cast(self, x_MK: Tensor, cast: Cast) -> Source:
        return super().cast(x_MK, cast) if cast.pow2 else self._compiled.split(x_MK, cast)

    def operand(
        self, source: Source, rule: OperandRule, transposed: bool = False, groups: PaddedGroups | None = None
    ) -> ScaledOperand:
        if rule.pow2:
            return super().operand(source, rule, transposed, groups)
        operand = self._split(source, rule.cast(transposed))
        return _transposed(operand) if transposed else operand

    def _split(self, source: Source, cast: Cast) -> QuantizedTensor:
        """Returns the `Source` quantised with this cast; `q` is bf16."""
        cast = fitted(cast, source)
        if isinstance(source, QuantizedTensor) and source.cast == cast:
            return self._compiled.decoded(source)
        return self._compiled.split(source.values if isinstance(source, RoundedTensor) else source, cast)

    def matmul(
        self, left: ScaledOperand, right: ScaledOperand, dtype: torch.dtype, into: Tensor | None = None
    ) -> Tensor:
        if self._is_torchs(left, right):
            return super().matmul(left, right, dtype, into)
        return scaled_matmul(left, right, dtype, into)

    def grouped(self, left: ScaledOperand, right: ScaledOperand, groups: PaddedGroups, dtype: torch.dtype) -> Tensor:
        if self._is_torchs(left, right):
            return super().grouped(left, right, groups, dtype)
        return scaled_grouped(left, right, groups, dtype)

    def grouped_wgrad(
        self,
        left: ScaledOperand,
        right: ScaledOperand,
        groups: PaddedGroups,
        dtype: torch.dtype,
        into: Tensor | None = None,
    ) -> Tensor:
        if self._is_torchs(left, right):
            return super().grouped_wgrad(left, right, groups, dtype, into)
        return scaled_grouped_wgrad(left, right, groups, dtype, into)

    def _swiglu(self, h_P2F: Tensor, gates_P: Tensor, rule: OperandRule) -> ScaledOperand:
        if rule.pow2 or rule.granularity != "1x128":
            return super()._swiglu(h_P2F, gates_P, rule)
        chunks = zip(swiglu.chunks(h_P2F), swiglu.chunks(gates_P, h_P2F), strict=True)
        parts = [self._split(swiglu.forward(h, gates), rule.cast()) for h, gates in chunks]
        q_PF, scale = torch.cat([part.q for part in parts]), torch.cat([part.scale for part in parts])
        return QuantizedTensor(q_PF, scale, parts[0].cast, q_PF.shape)

    def _is_torchs(self, left: ScaledOperand, right: ScaledOperand) -> bool:
        """Returns whether torch computes the matmul. It does if the operands have no scales and compiled matmuls are
        not faster.
        """
        if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
            return False
        return not (self._plain_too and left.dtype == right.dtype == torch.bfloat16)


def _transposed(x: QuantizedTensor) -> QuantizedTensor:
    *lead, rows, columns = x.shape
    cast = replace(x.cast, block=x.cast.block[::-1])
    return QuantizedTensor(x.q.mT, x.scale.mT, cast, torch.Size((*lead, columns, rows)))


def scaled_matmul(
    left_OC: ScaledOperand, right_NC: ScaledOperand, dtype: torch.dtype, into_ON: Tensor | None = None
) -> Tensor:
    """Computes left @ right^T, (O, N), into a new tensor, or adds it to `into_ON` (fp32)."""
    (rows, contraction), columns = left_OC.shape, right_NC.shape[0]
    out_ON = _values(left_OC).new_empty(rows, columns, dtype=dtype) if into_ON is None else into_ON
    _run("scaled_gemm", left_OC, right_NC, out_ON, [(0, rows, 0, 0, contraction, 0)], into_ON is not None)
    return out_ON


def scaled_grouped(
    left_PC: ScaledOperand, right_ENC: ScaledOperand, groups: PaddedGroups, dtype: torch.dtype
) -> Tensor:
    """Multiplies each expert's rows by its transposed matrix: (P, N), with zeros as padding."""
    _, columns, contraction = right_ENC.shape
    out_PN = _values(left_PC).new_zeros(groups.rows, columns, dtype=dtype)
    parts = parts_by_rows(groups.starts, groups.counts, columns, contraction)
    _run("grouped_scaled_gemm", left_PC, right_ENC, out_PN, parts)
    return out_PN


def scaled_grouped_wgrad(
    left_OP: ScaledOperand,
    right_NP: ScaledOperand,
    groups: PaddedGroups,
    dtype: torch.dtype,
    into_EON: Tensor | None = None,
) -> Tensor:
    """Computes each expert's weight gradient, a sum over its rows: (E, O, N). into_EON: see `scaled_matmul`."""
    rows, columns = left_OP.shape[0], right_NP.shape[0]
    shape = len(groups.counts), rows, columns
    out_EON = _values(left_OP).new_empty(shape, dtype=dtype) if into_EON is None else into_EON
    parts = parts_by_sums(groups.starts, groups.counts, rows, columns)
    _run("grouped_scaled_gemm", left_OP, right_NP, out_EON, parts, into_EON is not None)
    return out_EON


def need_compiled() -> None:
    """Raises UserError if compiled code cannot be built, stored or loaded."""
    load_library(
        source("products", "precision.fp8.compiled", "precision.fp8.compiled=false: torch's operations, slower")
    )


def _run(
    name: str, left: ScaledOperand, right: ScaledOperand, out: Tensor, parts: Sequence[Part], into: bool = False
) -> None:
    run_matmuls(name, _values(left), _values(right), out, parts, _scales(left), _scales(right), into)


def _values(x: ScaledOperand) -> Tensor:
    return x.q if isinstance(x, QuantizedTensor) else x


def _scales(x: ScaledOperand) -> tuple[Tensor | None, int]:
    """Returns an operand's scales and a shift. A scale applies to 1 << shift rows and to one tile along C."""
    if isinstance(x, Tensor):
        return NO_SCALES
    (side, along), (*lead, outer, contraction) = x.cast.block, x.shape
    one_outer, one_tile = (size <= 1 for size in x.scale.shape[-2:])
    assert (one_tile or along == TILE) and (one_outer or side in (1, TILE))
    shift = TILE.bit_length() - 1 if side > 1 else 0
    return x.scale.expand(*lead, -(-outer >> shift), -(-contraction // TILE)), shift
