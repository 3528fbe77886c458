"""Defines the protocol `Fp8Engine` for matmuls of quantised operands, and stores weights as operands during a step.

An engine converts tensors to operands and multiplies two operands. Every operand is (outer, contraction), so every
matmul is left @ right^T. The engines:

    engine            where           casts               GEMMs of layers       grouped GEMMs, and GEMMs added to a sum
    CpuEngine         any device      torch               torch                 torch (cpu_engine.py)
    CompiledEngine    CPU with AVX2   compiled_casts.py   compiled_engine.py    compiled_engine.py
    HopperEngine      sm_90           triton_quantize.py  cuBLASLt              triton_matmuls.py or DeepGEMM
    BlackwellEngine   sm_100, MXFP8   triton_quantize.py  cuBLASLt              torch (CUTLASS), then a separate
                      addition

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
"""A tensor that a layer saves for building operands."""


SourceForm = tuple[Cast, torch.Size] | Cast | None
"""Metadata of a `Source`: cast and shape of a `QuantizedTensor`, cast of a `RoundedTensor`, or None for a plain tensor.
"""


def pack_sources(*kept: Source) -> tuple[list[Tensor], list[SourceForm]]:
    """Returns the tensors of all arguments, which autograd can save, and one `SourceForm` per argument."""
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
    """Rebuild the sources from the results of `pack_sources`."""
    rest = iter(tensors)

    def one(form: SourceForm) -> Source:
        if isinstance(form, tuple):
            return QuantizedTensor(next(rest), next(rest), *form)
        return next(rest) if form is None else RoundedTensor(next(rest), form)

    return [one(form) for form in forms]


class Fp8Engine(Protocol):
    """Quantises and multiplies on one kind of device."""

    def keep(self, x_MK: Tensor, cast: Cast) -> Source:
        """Quantise a tensor to save it for backward. The bits are those of `quantize`; padding may follow."""

    def cast(self, x_MK: Tensor, cast: Cast) -> Source:
        """Quantise a tensor for immediate use, in this engine's cheapest form."""

    def take_arrived(self, q_MK: Tensor, scale: Tensor, cast: Cast) -> Source:
        """Returns what `keep` returns, from codes and scales (M, ceil(K / 128)) of another rank."""

    def operand(
        self, source: Source, rule: OperandRule, transposed: bool = False, groups: PaddedGroups | None = None
    ) -> Any:
        """Builds the operand (O, C) of a matmul from a tensor (O, C), or (C, O) if `transposed`. Leading axes remain.

        groups: positions of each expert's rows, for a separate sum per expert.
        """

    def cast_again(self, x_MK: Tensor, kept: Cast, rule: OperandRule) -> Any:
        """Quantises x with the cast `kept`, and builds the transposed operand from the result."""

    def values(self, source: Any) -> Tensor:
        """Returns a saved `Source`'s values in bf16."""

    def gradient(
        self, dy: Source, for_inputs: OperandRule, for_weights: OperandRule, groups: PaddedGroups | None = None
    ) -> tuple[Any, Any]:
        """Builds two left operands from a gradient (T, N): one for Dgrad, and a transposed one for Wgrad."""

    def groups(self, counts_E: Tensor, rows: int) -> PaddedGroups:
        """Returns the positions of each expert's rows. rows: the sum of counts_E."""

    def matmul(self, left: Any, right: Any, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
        """Returns left @ right^T in `dtype`, or adds it to `into` and returns `into`."""

    def grouped(self, left: Any, right: Any, groups: PaddedGroups, dtype: torch.dtype) -> Tensor:
        """Multiplies each expert's rows by its transposed matrix: left (P, C), right (E, N, C), result (P, N), zero in
        padding.
        """

    def grouped_wgrad(
        self, left: Any, right: Any, groups: PaddedGroups, dtype: torch.dtype, into: Tensor | None = None
    ) -> Tensor:
        """Returns left (O, P) @ right (N, P)^T, a sum over each expert's rows: (E, O, N). into: see `matmul`."""

    def swiglu(self, h_P2F: Tensor, gates_P: Tensor, rule: OperandRule, cache: Cast) -> tuple[Any, Source]:
        """Computes SwiGLU (train/kernels/fp8/swiglu.py).

        Returns SwiGLU's output as an operand, and h in the form saved for backward.
        """

    def swiglu_backward(self, h: Source, gates_P: Tensor, da_PF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns SwiGLU's recomputed output (P, F), and the gradients of h and of the gates."""

    def recompute_swiglu(self, h: Source, gates_P: Tensor) -> Tensor:
        """Returns only SwiGLU's recomputed output (P, F), bitwise as `swiglu_backward`."""


class HeldWeights:
    """Stores weights as operands, so that a step builds each operand once. No weight may change between `hold` and
    `drop`.

    A layer uses a weight in two casts: as stored for Fprop, and transposed for Dgrad. The first step builds operands at
    their first use. In later steps, `hold` builds all of them, which keeps memory use constant.

    making: function that returns a context manager, in which operands are built.
    """

    def __init__(self, engine: Fp8Engine, making: Callable[[], AbstractContextManager] = nullcontext):
        self.engine, self._making, self._holds = engine, making, False
        self._weights: dict[int, nn.Parameter] = {}
        self._asked: dict[tuple[int, bool], OperandRule] = {}
        self._made: dict[tuple[int, bool], Any] = {}

    def name(self, weight: Tensor) -> int | None:
        """Returns an identifier of a weight for `operand`; None if its operands are not stored.

        Forward saves the identifier for backward, where autograd may pass another tensor object with the same memory.
        """
        if not (self._holds and isinstance(weight, nn.Parameter)):
            return None
        self._weights[id(weight)] = weight
        return id(weight)

    def operand(self, weight: Tensor, name: int | None, rule: OperandRule, transposed: bool = False) -> Any:
        """Returns a weight's stored operand, or builds it.

        name: identifier of the weight, from the method `name`. rule, transposed: see `Fp8Engine.operand`.
        """
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
        """Build all operands that earlier steps used. Store every operand until `drop`."""
        self.drop()
        self._holds = True
        for (name, transposed), rule in self._asked.items():
            self.operand(self._weights[name], name, rule, transposed)

    def drop(self) -> None:
        """Drop all stored operands. Call this before a weight changes."""
        self._holds = False
        self._made.clear()

    def count_bytes(self) -> int:
        """Returns the number of bytes of the stored operands that share no memory with weights."""
        weights = {weight.untyped_storage()._cdata for weight in self._weights.values()}
        parts = [tensor for made in self._made.values() for tensor in _tensors(made)]
        storages = {one._cdata: one.nbytes() for one in (tensor.untyped_storage() for tensor in parts)}
        return sum(size for key, size in storages.items() if key not in weights)


def _tensors(made: Any) -> list[Tensor]:
    """Returns an operand's tensors: itself, or its fields."""
    return [made] if isinstance(made, Tensor) else [one for one in vars(made).values() if isinstance(one, Tensor)]
