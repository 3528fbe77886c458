"""The CPU's emulation with compiled products, where operands with fp32 scales stay values and scales up to the product.

The values are numbers of the format, exact in bf16, so that the product costs what a bf16 one costs (`scaled_products`).
Operands whose scales are powers of two, or that are to be rounded, have these inside, in bf16 as in `CpuEngine`; products of
two such are the plain ones of train/kernels/cpu/compiled_products.py, or torch's where those are faster.
"""

from dataclasses import replace

import torch
from torch import Tensor

from train.kernels.fp8 import scaled_products, swiglu
from train.kernels.fp8.cast_rules import OperandRule
from train.kernels.fp8.compiled_casts import CompiledCasts
from train.kernels.fp8.cpu_engine import CpuEngine
from train.kernels.fp8.engines import RoundedTensor, Source
from train.kernels.fp8.formats import Cast
from train.kernels.fp8.groups import PaddedGroups
from train.kernels.fp8.quantize import QuantizedTensor, fitted
from train.kernels.fp8.scaled_products import ScaledOperand
from train.model.operations import Kernels


class CompiledEngine(CpuEngine):
    """`CpuEngine`, but for the order of sums; CPU and meta tensors only. Values of operands with fp32 scales are rounded to bf16 nowhere."""

    def __init__(self, casts: CompiledCasts, kernels: Kernels):
        super().__init__(casts)
        self._compiled, self._plain_too = casts, "products" in kernels.parts

    def cast(self, x_MK: Tensor, cast: Cast) -> Source:
        return super().cast(x_MK, cast) if cast.pow2 else self._compiled.split(x_MK, cast)

    def operand(
        self, source: Source, rule: OperandRule, transposed: bool = False, groups: PaddedGroups | None = None
    ) -> ScaledOperand:
        if rule.format is None or rule.pow2:
            return super().operand(source, rule, transposed, groups)
        operand = self._split(source, rule.cast(transposed))
        return _transposed(operand) if transposed else operand

    def _split(self, source: Source, cast: Cast) -> QuantizedTensor:
        """Values and scales of a source in this format."""
        cast = fitted(cast, source)
        if isinstance(source, QuantizedTensor) and source.cast == cast:
            return self._compiled.decoded(source)
        return self._compiled.split(source.values if isinstance(source, RoundedTensor) else source, cast)

    def product(
        self, left: ScaledOperand, right: ScaledOperand, dtype: torch.dtype, into: Tensor | None = None
    ) -> Tensor:
        if self._is_torchs(left, right):
            return super().product(left, right, dtype, into)
        return scaled_products.product(left, right, dtype, into)

    def grouped(self, left: ScaledOperand, right: ScaledOperand, groups: PaddedGroups, dtype: torch.dtype) -> Tensor:
        if self._is_torchs(left, right):
            return super().grouped(left, right, groups, dtype)
        return scaled_products.grouped(left, right, groups, dtype)

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
        return scaled_products.grouped_wgrad(left, right, groups, dtype, into)

    def _swiglu(self, h_P2F: Tensor, gates_P: Tensor, rule: OperandRule) -> ScaledOperand:
        if rule.format is None or rule.pow2 or rule.granularity != "1x128":
            return super()._swiglu(h_P2F, gates_P, rule)
        chunks = zip(swiglu.chunks(h_P2F), swiglu.chunks(gates_P, h_P2F), strict=True)
        parts = [self._split(swiglu.forward(h, gates), rule.cast()) for h, gates in chunks]
        q_PF, scale = torch.cat([part.q for part in parts]), torch.cat([part.scale for part in parts])
        return QuantizedTensor(q_PF, scale, parts[0].cast, q_PF.shape)

    def _is_torchs(self, left: ScaledOperand, right: ScaledOperand) -> bool:
        """Whether the product is one for torch: no scales, and no faster as compiled code."""
        if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
            return False
        return not (self._plain_too and left.dtype == right.dtype == torch.bfloat16)


def _transposed(x: QuantizedTensor) -> QuantizedTensor:
    *lead, rows, columns = x.shape
    cast = replace(x.cast, block=x.cast.block[::-1])
    return QuantizedTensor(x.q.mT, x.scale.mT, cast, torch.Size((*lead, columns, rows)))
