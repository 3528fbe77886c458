"""Who computes with quantised operands: the protocol `Fp8Engine`, and the forms of what goes in.

An engine makes operands out of tensors and multiplies two operands.  Every operand is (outer, contraction), so each
product is left @ right^T.  Which engine a run has:

    engine            where              casts                products of layers   products of experts
    CpuEngine         any device         torch                torch                torch (cpu_engine.py)
    CompiledEngine    CPU                compiled_casts.py    scaled_products.py   scaled_products.py
    HopperEngine      sm_90              triton_quantize.py   cuBLASLt             grouped_products.py
    BlackwellEngine   sm_100, MXFP8      triton_quantize.py   cuBLASLt             torch

Rows of other ranks arrive quantised where parallel.wire=fp8 sent them so, and are no more cast (`Fp8Engine.take_arrived`).

Shape suffixes: O outer, C contraction, P padded rows (train/kernels/fp8/groups.py), E experts, N outer of the right operand.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from train.kernels.fp8.cast_rules import OperandRule
from train.kernels.fp8.formats import Cast
from train.kernels.fp8.groups import PaddedGroups
from train.kernels.fp8.quantize import QuantizedTensor


@dataclass(frozen=True)
class RoundedTensor:
    """A quantised tensor held as the values that it stands for."""

    values: Tensor
    cast: Cast

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


Source = Tensor | QuantizedTensor | RoundedTensor
"""What an operand is made of, and what a layer keeps for backward: a tensor as it came, or quantised."""


SourceForm = tuple[Cast, torch.Size] | Cast | None
"""A source without its tensors."""


def pack_sources(*kept: Source) -> tuple[list[Tensor], list[SourceForm]]:
    """Tensors for autograd to save, and what `unpack_sources` needs to put them together again."""
    tensors: list[Tensor] = []
    forms: list[SourceForm] = []
    for one in kept:
        if isinstance(one, QuantizedTensor):
            tensors += [one.q, one.scale]
            forms.append((one.cast, one.shape))
        elif isinstance(one, RoundedTensor):
            tensors.append(one.values)
            forms.append(one.cast)
        else:
            tensors.append(one)
            forms.append(None)
    return tensors, forms


def unpack_sources(tensors: Sequence[Tensor], forms: list[SourceForm]) -> list[Source]:
    """Inverse of `pack_sources`."""
    rest = iter(tensors)

    def one(form: SourceForm) -> Source:
        if isinstance(form, tuple):
            return QuantizedTensor(next(rest), next(rest), *form)
        return next(rest) if form is None else RoundedTensor(next(rest), form)

    return [one(form) for form in forms]


class Fp8Engine(Protocol):
    """Quantises and multiplies on one kind of device."""

    def keep(self, x_MK: Tensor, cast: Cast) -> Source:
        """Quantise, to keep for backward: bit for bit `quantize_reference`, perhaps padded."""

    def cast(self, x_MK: Tensor, cast: Cast) -> Source:
        """A cast to use at once, in whatever form is cheapest."""

    def take_arrived(self, q_MK: Tensor, scale: Tensor, cast: Cast) -> Source:
        """What `keep` would give for values that are quantised already. scale: (M, ceil(K / 128))."""

    def operand(
        self, source: Source, rule: OperandRule, transposed: bool = False, groups: PaddedGroups | None = None
    ) -> Any:
        """Operand (O, C) of a source (O, C), or with `transposed` of a source (C, O). Leading axes stay.

        groups: the contraction runs over the padded rows of several experts, each on its own.
        """

    def cast_again(self, x_MK: Tensor, kept: Cast, rule: OperandRule) -> Any:
        """`operand`, transposed, of what the first cast leaves."""

    def gradient(
        self, dy: Source, for_inputs: OperandRule, for_weights: OperandRule, groups: PaddedGroups | None = None
    ) -> tuple[Any, Any]:
        """Both left operands that a gradient (T, N) is: that of Dgrad, and transposed that of Wgrad."""

    def groups(self, counts_E: Tensor, rows: int, in_tiles: bool = True) -> PaddedGroups:
        """The layout of so many rows in all of experts with these row counts, for all that has `groups` here. in_tiles: whether
        every cast of them has scales of 1x128, or 128x1 for Wgrad.
        """

    def product(self, left: Any, right: Any, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
        """left @ right^T. into: of dtype; the product is added to it, and it is returned."""

    def grouped(self, left: Any, right: Any, groups: PaddedGroups, dtype: torch.dtype) -> Tensor:
        """left (P, C), right (E, N, C): each expert's rows times its own matrix, (P, N), zero in the padding."""

    def grouped_wgrad(
        self, left: Any, right: Any, groups: PaddedGroups, dtype: torch.dtype, into: Tensor | None = None
    ) -> Tensor:
        """left (O, P), right (N, P): for each expert the sum over its rows, (E, O, N). into: as in `product`."""

    def swiglu(self, h_P2F: Tensor, gates_P: Tensor, rule: OperandRule, cache: Cast | None) -> tuple[Any, Source]:
        """Operand of SwiGLU's output (train/kernels/fp8/swiglu.py), and what backward takes as h: h itself where it has no cache."""

    def swiglu_backward(self, h: Source, gates_P: Tensor, da_PF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a (P, F), dh (P, 2F) and the gradient of the gates (P,)."""

    def recompute_swiglu(self, h: Source, gates_P: Tensor) -> Tensor:
        """The a of `swiglu_backward` alone."""


class Casts(Protocol):
    """Casts of CPU tensors, each bit for bit as train/kernels/fp8/quantize.py defines it."""

    def quantize(self, x_MK: Tensor, cast: Cast) -> QuantizedTensor:
        """Codes and scales."""

    def fake_quantize(self, x: Tensor | QuantizedTensor, cast: Cast, dtype: torch.dtype) -> Tensor:
        """Values that the cast leaves, of dtype."""

    def dequantize(self, x: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        """Values of the codes, of dtype."""
