"""Emulates FP8 matmuls with torch operations, on CPUs and any other device.

A matmul multiplies the dequantised operands, which are exact, and accumulates in fp32. If the scales are powers of two,
bf16 represents the operands; otherwise the matmul is fp32.

`CompiledEngine` (train/kernels/fp8/compiled_engine.py) sums every 128 elements of the contraction separately, like
Hopper kernels; `CpuEngine` computes one sum. Results differ by 3e-7; the quantisation error is 4e-2.

Shape suffixes: as in train/kernels/fp8/engines.py.
"""

from typing import Any

import torch
from torch import Tensor

from conf.thresholds import THRESHOLDS
from train.kernels.fp8 import swiglu
from train.kernels.fp8.cast_rules import OperandRule
from train.kernels.fp8.engines import RoundedTensor, Source
from train.kernels.fp8.formats import Cast
from train.kernels.fp8.groups import PaddedGroups
from train.kernels.fp8.quantize import EagerCasts, QuantizedTensor, exact_dtype, fitted
from train.kernels.plain.plain_kernels import added

CpuOperand = Tensor | QuantizedTensor
"""An operand on a CPU. Only `CompiledEngine` accepts a `QuantizedTensor`."""


class CpuEngine:
    """`Fp8Engine` with torch operations on any device; the reference of `CompiledEngine`.

    casts: the implementation of casts; None: torch operations.
    """

    def __init__(self, casts: EagerCasts | None = None):
        self._casts = casts or EagerCasts()

    def keep(self, x_MK: Tensor, cast: Cast) -> Source:
        return self._casts.quantize(x_MK, cast)

    def cast(self, x_MK: Tensor, cast: Cast) -> Source:
        return RoundedTensor(self._casts.fake_quantize(x_MK, cast, exact_dtype(cast)), fitted(cast, x_MK))

    def take_arrived(self, q_MK: Tensor, scale: Tensor, cast: Cast) -> Source:
        return QuantizedTensor(q_MK, scale, fitted(cast, q_MK), q_MK.shape)

    def operand(
        self, source: Source, rule: OperandRule, transposed: bool = False, groups: PaddedGroups | None = None
    ) -> CpuOperand:
        return self._tensor(source, rule, transposed)

    def _tensor(self, source: Source, rule: OperandRule, transposed: bool = False) -> Tensor:
        cast = fitted(rule.cast(transposed), source)
        dtype = exact_dtype(cast)
        if isinstance(source, Tensor) or source.cast != cast:
            x = source.values if isinstance(source, RoundedTensor) else source
            values = self._casts.fake_quantize(x, cast, dtype)
        else:
            values = self._values(source, dtype)
        return values.mT if transposed else values

    def cast_again(self, x_MK: Tensor, kept: Cast, rule: OperandRule) -> Any:
        return self.operand(self.cast(x_MK, kept), rule, transposed=True)

    def values(self, source: Source) -> Tensor:
        return self._values(source, torch.bfloat16)

    def gradient(
        self, dy: Source, for_inputs: OperandRule, for_weights: OperandRule, groups: PaddedGroups | None = None
    ) -> tuple[Any, Any]:
        return self.operand(dy, for_inputs), self.operand(dy, for_weights, transposed=True, groups=groups)

    def groups(self, counts_E: Tensor, rows: int) -> PaddedGroups:
        return PaddedGroups(counts_E)

    def matmul(self, left: CpuOperand, right: CpuOperand, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
        left, right = _common(left, right, dtype)
        return added((left @ right.mT).to(dtype), into)

    def grouped(self, left: CpuOperand, right: CpuOperand, groups: PaddedGroups, dtype: torch.dtype) -> Tensor:
        left, right = _common(left, right, dtype)
        out_PN = left.new_zeros(groups.rows, right.shape[1])
        for rows, right_NC in zip(groups.real(THRESHOLDS.expert_rows), right, strict=True):
            torch.mm(left[rows], right_NC.mT, out=out_PN[rows])
        return out_PN.to(dtype)

    def grouped_wgrad(
        self, left: CpuOperand, right: CpuOperand, groups: PaddedGroups, dtype: torch.dtype, into: Tensor | None = None
    ) -> Tensor:
        left, right = _common(left, right, dtype)
        out_EON = left.new_empty(len(groups.counts), left.shape[0], right.shape[0])
        for rows, out_ON in zip(groups.real(THRESHOLDS.expert_rows), out_EON, strict=True):
            torch.mm(left[:, rows], right[:, rows].mT, out=out_ON)
        return added(out_EON.to(dtype), into)

    def swiglu(self, h_P2F: Tensor, gates_P: Tensor, rule: OperandRule, cache: Cast) -> tuple[Any, Source]:
        return self._swiglu(h_P2F, gates_P, rule), self.keep(h_P2F, cache)

    def _swiglu(self, h_P2F: Tensor, gates_P: Tensor, rule: OperandRule) -> Any:
        if rule.granularity != "1x128":
            return self.operand(swiglu.forward(h_P2F, gates_P), rule)
        parts = zip(swiglu.chunks(h_P2F), swiglu.chunks(gates_P, h_P2F), strict=True)
        return torch.cat([self._tensor(swiglu.forward(h, gates), rule) for h, gates in parts])

    def swiglu_backward(self, h: Source, gates_P: Tensor, da_PF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return swiglu.backward(self._values(h), gates_P, da_PF)

    def recompute_swiglu(self, h: Source, gates_P: Tensor) -> Tensor:
        return swiglu.recompute(self._values(h), gates_P)

    def _values(self, source: Source, dtype: torch.dtype | None = None) -> Tensor:
        """Returns a `Source`'s values: exact, or rounded to `dtype` if given."""
        if isinstance(source, QuantizedTensor):
            return self._casts.dequantize(source, dtype or exact_dtype(source.cast))
        values = source.values if isinstance(source, RoundedTensor) else source
        return values.to(dtype or values.dtype)


def _common(left: CpuOperand, right: CpuOperand, result: torch.dtype) -> tuple[Tensor, Tensor]:
    """Converts both operands to a dtype that represents both exactly.

    An fp32 result needs fp32 operands, because torch rounds a result to the operands' dtype.
    """
    assert isinstance(left, Tensor) and isinstance(right, Tensor), "the others are CompiledEngine's"
    if left.dtype == right.dtype and (left.dtype == torch.float32 or result != torch.float32):
        return left, right
    return left.float(), right.float()
