"""Defines the protocol `Fp8Engine` for matmuls of quantised operands, and stores weights as operands during a step.

An engine converts tensors to operands and multiplies two operands. Every operand is (outer, contraction), so every
matmul is left @ right^T. The engines:

    engine            where            casts                 GEMMs of layers        grouped GEMMs, and GEMMs added to a sum
    CpuEngine         any device       torch                 torch                  torch (cpu_engine.py)
    CompiledEngine    CPU with AVX2    compiled_casts.py     compiled_engine.py     compiled_engine.py
    HopperEngine      sm_90            triton_quantize.py    cuBLASLt               triton_matmuls.py, or DeepGEMM if the recipe asks for it
    BlackwellEngine   sm_100, MXFP8    triton_quantize.py    cuBLASLt               torch (CUTLASS), with separate additions

With parallel.wire=fp8, rows of other ranks arrive quantised and are not cast again (`Fp8Engine.take_arrived`).

Shape suffixes: O outer, C contraction, P padded rows (train/kernels/fp8/groups.py), E experts, N outer of the right
operand.
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
    """A quantised tensor stored as its dequantised values."""

    values: Tensor
    cast: Cast

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


Source = Tensor | QuantizedTensor | RoundedTensor
"""A tensor from which an engine builds an operand, and which a layer saves for backward: original or quantised."""


SourceForm = tuple[Cast, torch.Size] | Cast | None
"""Describes a source without its tensors, so that `unpack_sources` can rebuild it."""


def pack_sources(*kept: Source) -> tuple[list[Tensor], list[SourceForm]]:
    """Returns tensors for autograd to save, and the forms from which `unpack_sources` rebuilds the sources."""
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
        """Quantise a tensor to save it for backward. The result equals that of `quantize` in all bits, but may be
        padded."""

    def cast(self, x_MK: Tensor, cast: Cast) -> Source:
        """Quantise a tensor for immediate use, in the cheapest form."""

    def take_arrived(self, q_MK: Tensor, scale: Tensor, cast: Cast) -> Source:
        """Returns the result of `keep` for values that arrived quantised. scale: (M, ceil(K / 128))."""

    def operand(
        self, source: Source, rule: OperandRule, transposed: bool = False, groups: PaddedGroups | None = None
    ) -> Any:
        """Builds the operand (O, C) from a source (O, C), or with `transposed` from a source (C, O). Keeps leading
        axes.

        groups: the contraction runs over the padded rows of several experts, separately for each expert.
        """

    def cast_again(self, x_MK: Tensor, kept: Cast, rule: OperandRule) -> Any:
        """Returns the transposed `operand` of the values that the cast of `keep` produces."""

    def values(self, source: Any) -> Tensor:
        """Returns the values of a saved source, in bf16."""

    def gradient(
        self, dy: Source, for_inputs: OperandRule, for_weights: OperandRule, groups: PaddedGroups | None = None
    ) -> tuple[Any, Any]:
        """Builds both left operands from a gradient (T, N): one for Dgrad, and a transposed one for Wgrad."""

    def groups(self, counts_E: Tensor, rows: int) -> PaddedGroups:
        """Returns the layout of `rows` rows with these counts per expert, for the `groups` arguments of this engine."""

    def matmul(self, left: Any, right: Any, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
        """Returns left @ right^T. into: a tensor of dtype; the result is added to it, and it is returned."""

    def grouped(self, left: Any, right: Any, groups: PaddedGroups, dtype: torch.dtype) -> Tensor:
        """Multiplies the rows of each expert by the expert's matrix: left (P, C), right (E, N, C). Returns (P, N), with
        zeros in the padding."""

    def grouped_wgrad(
        self, left: Any, right: Any, groups: PaddedGroups, dtype: torch.dtype, into: Tensor | None = None
    ) -> Tensor:
        """Sums over the rows of each expert: left (O, P), right (N, P). Returns (E, O, N). into: see `matmul`."""

    def swiglu(self, h_P2F: Tensor, gates_P: Tensor, rule: OperandRule, cache: Cast) -> tuple[Any, Source]:
        """Returns the operand of SwiGLU's output (train/kernels/fp8/swiglu.py), and h in the form to save for
        backward."""

    def swiglu_backward(self, h: Source, gates_P: Tensor, da_PF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns a (P, F), dh (P, 2F) and the gradient of the gates (P,)."""

    def recompute_swiglu(self, h: Source, gates_P: Tensor) -> Tensor:
        """Returns only the tensor `a` of `swiglu_backward`."""


class HeldWeights:
    """Stores weights as operands, which are built only one time in each step. No weight may change between `hold` and
    `drop`.

    A layer uses a weight in two casts: as stored for Fprop, and transposed for Dgrad. Weights change only between
    steps, so all micro-batches can use the same operands. The first step builds each operand at its first use. Later
    steps build all operands before their passes, so that the memory use is constant during the passes.

    making: a context around the construction of operands, in which a caller can measure their memory separately.
    """

    def __init__(self, engine: Fp8Engine, making: Callable[[], AbstractContextManager] = nullcontext):
        self.engine, self._making, self._holds = engine, making, False
        self._weights: dict[int, nn.Parameter] = {}
        self._asked: dict[tuple[int, bool], OperandRule] = {}
        self._made: dict[tuple[int, bool], Any] = {}

    def name(self, weight: Tensor) -> int | None:
        """Returns a key of a weight. Backward needs it, because autograd may pass another tensor with the same memory.

        The key is None if the weight's operands are not stored, for example if the weight was just unpacked from bytes.
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
        """Build all operands that earlier steps used. Store them and all operands that are built later."""
        self.drop()
        self._holds = True
        for (name, transposed), rule in self._asked.items():
            self.operand(self._weights[name], name, rule, transposed)

    def drop(self) -> None:
        """Drop all operands, before a weight changes."""
        self._holds = False
        self._made.clear()

    def count_bytes(self) -> int:
        """Returns the bytes of the stored operands. Operands that share memory with the weights are left out."""
        weights = {weight.untyped_storage()._cdata for weight in self._weights.values()}
        parts = [tensor for made in self._made.values() for tensor in _tensors(made)]
        storages = {one._cdata: one.nbytes() for one in (tensor.untyped_storage() for tensor in parts)}
        return sum(size for key, size in storages.items() if key not in weights)


def _tensors(made: Any) -> list[Tensor]:
    """Returns the tensors of an operand. The operand is a tensor, or it has tensors as fields."""
    return [made] if isinstance(made, Tensor) else [one for one in vars(made).values() if isinstance(one, Tensor)]
