"""Who computes with quantised operands: the protocol `Fp8Engine`, the forms of what goes in, and weights that are held as operands.

An engine makes operands out of tensors and multiplies two operands.  Every operand is (outer, contraction), so each
product is left @ right^T.  Which engine a run has:

    engine            where            casts                 products of layers     products of experts, and those added to a sum
    CpuEngine         any device       torch                 torch                  torch (cpu_engine.py)
    CompiledEngine    CPU with AVX2    compiled_casts.py     compiled_engine.py     compiled_engine.py
    HopperEngine      sm_90            triton_quantize.py    cuBLASLt               triton_products.py, or DeepGEMM where it is asked for
    BlackwellEngine   sm_100, MXFP8    triton_quantize.py    cuBLASLt               torch (CUTLASS), sums in a pass of their own

Rows of other ranks arrive quantised where parallel.wire=fp8 sent them so, and are no more cast (`Fp8Engine.take_arrived`).

Shape suffixes: O outer, C contraction, P padded rows (train/kernels/fp8/groups.py), E experts, N outer of the right operand.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

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
        """Quantise, to keep for backward: bit for bit `quantize`, perhaps padded."""

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

    def values(self, source: Any) -> Tensor:
        """What was kept stands for, in bf16."""

    def gradient(
        self, dy: Source, for_inputs: OperandRule, for_weights: OperandRule, groups: PaddedGroups | None = None
    ) -> tuple[Any, Any]:
        """Both left operands that a gradient (T, N) is: that of Dgrad, and transposed that of Wgrad."""

    def groups(self, counts_E: Tensor, rows: int) -> PaddedGroups:
        """The layout of so many rows in all of experts with these row counts, for all that has `groups` here."""

    def product(self, left: Any, right: Any, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
        """left @ right^T. into: of dtype; the product is added to it, and it is returned."""

    def grouped(self, left: Any, right: Any, groups: PaddedGroups, dtype: torch.dtype) -> Tensor:
        """left (P, C), right (E, N, C): each expert's rows times its own matrix, (P, N), zero in the padding."""

    def grouped_wgrad(
        self, left: Any, right: Any, groups: PaddedGroups, dtype: torch.dtype, into: Tensor | None = None
    ) -> Tensor:
        """left (O, P), right (N, P): for each expert the sum over its rows, (E, O, N). into: as in `product`."""

    def swiglu(self, h_P2F: Tensor, gates_P: Tensor, rule: OperandRule, cache: Cast) -> tuple[Any, Source]:
        """Operand of SwiGLU's output (train/kernels/fp8/swiglu.py), and h as it is kept for backward."""

    def swiglu_backward(self, h: Source, gates_P: Tensor, da_PF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a (P, F), dh (P, 2F) and the gradient of the gates (P,)."""

    def recompute_swiglu(self, h: Source, gates_P: Tensor) -> Tensor:
        """The a of `swiglu_backward` alone."""


class HeldWeights:
    """Weights as operands, made once a step and held through its micro-batches. Between `hold` and `drop` no weight may change.

    A product takes a weight in two casts: as it is for Fprop, transposed for Dgrad. Weights change between steps alone, so every
    micro-batch would make the same ones again. The first step makes each where it is asked for; later ones make all of them before their
    passes, which then find the same memory taken from beginning to end.

    making: the context in which operands that are held are made, for whoever counts them apart.
    """

    def __init__(self, engine: Fp8Engine, making: Callable[[], AbstractContextManager] = nullcontext):
        self.engine, self._making, self._holds = engine, making, False
        self._weights: dict[int, nn.Parameter] = {}
        self._asked: dict[tuple[int, bool], OperandRule] = {}
        self._made: dict[tuple[int, bool], Any] = {}

    def name(self, weight: Tensor) -> int | None:
        """What stands for a weight in a backward, which autograd may give another tensor of the same memory. None for what is not held, as is no
        weight that was just made of other bytes.
        """
        if not (self._holds and isinstance(weight, nn.Parameter)):
            return None
        self._weights[id(weight)] = weight
        return id(weight)

    def operand(self, weight: Tensor, name: int | None, rule: OperandRule, transposed: bool = False) -> Any:
        """See `Fp8Engine.operand`."""
        if name is None or not self._holds:
            return self.engine.operand(weight, rule, transposed)
        key = name, transposed
        if key not in self._made:
            with self._making():
                self._made[key] = self.engine.operand(weight, rule, transposed)
            self._asked[key] = rule
        return self._made[key]

    @torch.no_grad()
    def hold(self) -> None:
        """Make what was asked for before, and hold it with all that is asked for from now on."""
        self.drop()
        self._holds = True
        for (name, transposed), rule in self._asked.items():
            self.operand(self._weights[name], name, rule, transposed)

    def drop(self) -> None:
        """Let go of all operands, before a weight changes."""
        self._holds = False
        self._made.clear()

    def count_bytes(self) -> int:
        """Bytes of what is held, without what are the weights themselves."""
        weights = {weight.untyped_storage()._cdata for weight in self._weights.values()}
        parts = [tensor for made in self._made.values() for tensor in _tensors(made)]
        storages = {one._cdata: one.nbytes() for one in (tensor.untyped_storage() for tensor in parts)}
        return sum(size for key, size in storages.items() if key not in weights)


def _tensors(made: Any) -> list[Tensor]:
    """An operand is a tensor, or has its tensors as fields."""
    return [made] if isinstance(made, Tensor) else [one for one in vars(made).values() if isinstance(one, Tensor)]
