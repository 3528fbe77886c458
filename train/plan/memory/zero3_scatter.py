"""Runs the passes of a model part under ZeRO stage 3, unit by unit, and reduces gradients during backward.

Backward computes complete fp32 gradients in reverse module order. DeepSpeed copies those that fit into a bucket
(parallel/zero/sharded_weights.py). It reduces the bucket when the next gradient does not fit, or must be summed over
other ranks (dense weights and experts have different groups of ranks). Each rank adds its part of the sums to its
shard's gradients.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from train.plan.memory.part import PassMemory, Run, Scene, traced_once
from train.plan.memory.rank_weights import FP32_BYTES


class WaitingGradients(NamedTuple):
    """Gradients that backward has computed and that are not yet reduced."""

    elements: int = 0
    padded: int = 0
    """Number of elements of the waiting gradients, with the padding to equal shards."""
    tensors: int = 0
    experts: bool = False


NOTHING = WaitingGradients()


@dataclass(frozen=True)
class Bucket:
    """DeepSpeed's bucket of gradients that wait for their reduction."""

    limit: int
    """Size of the bucket in elements."""
    dense_ranks: int
    expert_ranks: int
    gloo: bool

    def is_full(self, waiting: WaitingGradients, elements: int, experts: bool) -> bool:
        """Whether the waiting gradients must be reduced before this gradient is added."""
        return waiting.tensors > 0 and (experts != waiting.experts or waiting.elements + elements > self.limit)

    def add(self, waiting: WaitingGradients, elements: int, experts: bool) -> WaitingGradients:
        ranks = self.expert_ranks if experts else self.dense_ranks
        padded = -(-elements // ranks) * ranks
        return WaitingGradients(waiting.elements + elements, waiting.padded + padded, waiting.tensors + 1, experts)

    def takes(self, elements: int) -> bool:
        """Whether a gradient of this size is copied into the bucket."""
        return elements <= self.limit

    def reduction(self, waiting: WaitingGradients) -> int:
        """Returns the peak bytes of a reduction.

        It allocates a copy in the order of the shards, and a copy for gloo's sum or for scaling.
        """
        ranks = self.expert_ranks if waiting.experts else self.dense_ranks
        in_order = 0 if waiting.tensors == 1 and waiting.elements == waiting.padded else waiting.padded
        summed = waiting.padded if self.gloo else 0
        scaled = waiting.padded // ranks if ranks != self.dense_ranks else 0
        return FP32_BYTES * (in_order + max(summed, scaled))


class Visit(NamedTuple):
    """One execution of a unit in a pass: live bytes at its start, and peak."""

    unit: str
    start: int
    peak: int

    def lifted(self, below: int) -> "Visit":
        """Returns a copy of this execution, with `below` bytes added to its live bytes."""
        return Visit(self.unit, self.start + below, self.peak + below)


@traced_once
def trace_unit_forward(scene: Scene, part: str) -> tuple[Visit, ...]:
    """Returns the execution of each unit in a model part's forward. DeepSpeed gathers a unit's weights together.

    The part `end` has the units norm, mtp.0 ... and head. Every other part is one unit.
    """
    with _UnitRun(scene, part) as run:
        return run.visits(run.forward().run)


@traced_once
def trace_unit_evaluation(scene: Scene, part: str) -> tuple[Visit, ...]:
    """Returns the execution of each unit in a model part's forward without gradients."""
    with _UnitRun(scene, part) as run:
        return run.visits(run.evaluate())


@traced_once
def trace_unit_backward(
    scene: Scene, part: str, held: bool, bucket: Bucket, waiting: WaitingGradients
) -> tuple[PassMemory, tuple[Visit, ...], WaitingGradients]:
    """Returns a part's backward memory, the executions of its units, and the unreduced gradients.

    held: as in `trace_backward`
    waiting: gradients that are not yet reduced when this backward starts
    """
    with _UnitRun(scene, part, bucket, waiting) as run:
        run.forward()
        whole = run.backward(held)
        return whole, run.visits(whole), run.waiting


class _UnitRun(Run):
    """Runs a model part, records when each unit starts, and adds gradients to the bucket."""

    def __init__(self, scene: Scene, part: str, bucket: Bucket | None = None, waiting: WaitingGradients = NOTHING):
        super().__init__(scene, part, first=bucket is not None)
        self._bucket, self.waiting = bucket, waiting

    def __enter__(self) -> "_UnitRun":
        super().__enter__()
        for name, unit in self._module.named_modules():
            if self._part == "end" and name and unit_of(name) == name:
                unit.register_forward_pre_hook(lambda *_, name=name: self._visit(name))
                unit.register_forward_hook(lambda _, __, out, name=name: self._watch(out, name))
        trained = ((name, param) for name, param in self._module.named_parameters() if param.requires_grad)
        own = [(name, param) for name, param in trained if unit_of(name) or self._part != "end"]
        if self._scene.warms_index:
            own = [(name, param) for name, param in own if ".indexer." in name]
        apart = self._scene.ep > 1  # without expert groups, all gradients are summed over the same ranks
        self._order = [(param, apart and ".experts." in name) for name, param in reversed(own)]
        self._ready: set[nn.Parameter] = set()
        self._large: list[Tensor] = []
        """Waiting gradients that are larger than the bucket."""
        if self._bucket is not None:
            if not self._bucket.takes(self.waiting.elements):
                self._large.append(torch.empty(self.waiting.elements, device="meta"))
            for param, _ in self._order:
                param.register_post_accumulate_grad_hook(self._arrived)
        return self

    def visits(self, whole: PassMemory) -> tuple[Visit, ...]:
        """Returns the execution of each unit in the newest pass. whole: the memory of this pass"""
        found, firsts = [], [0, *(first for _, first in self._begun[1:]), len(whole.pieces)]
        for (unit, _), first, end in zip(self._begun, firsts, firsts[1:], strict=False):
            start = whole.pieces[first - 1].end if first else whole.start
            found.append(Visit(unit, start, max(start, *(piece.peak for piece in whole.pieces[first:end]))))
        return tuple(found)

    def _begin(self) -> None:
        super()._begin()
        self._begun: list[tuple[str, int]] = [] if self._part == "end" else [(self._part, 0)]

    def _visit(self, unit: str) -> None:
        if self._pieces is not None and unit not in (name for name, _ in self._begun):
            self._cut()
            self._begun.append((unit, len(self._pieces)))

    def _watch(self, out: Tensor | list[Tensor], unit: str) -> None:
        """Records the start of a unit's backward: the moment at which the gradient of the unit's output exists."""
        for tensor in (out if isinstance(out, list) else [out]) if torch.is_grad_enabled() else ():
            tensor.register_hook(lambda _: self._visit(unit))

    def _arrived(self, param: nn.Parameter) -> None:
        self._ready.add(param)
        while self._order and self._order[0][0] in self._ready:
            self._hand_over(*self._order.pop(0))

    def _hand_over(self, param: nn.Parameter, experts: bool) -> None:
        bucket, elements = self._bucket, param.numel()
        assert bucket is not None and param.grad is not None
        if bucket.is_full(self.waiting, elements, experts):
            torch.empty(bucket.reduction(self.waiting), dtype=torch.uint8, device="meta")
            self.waiting = NOTHING
            self._large.clear()
        if not bucket.takes(elements):
            self._large.append(param.grad)
        self.waiting = bucket.add(self.waiting, elements, experts)
        param.grad = None


def unit_of(name: str) -> str:
    """Returns a module's or weight's unit: norm, head, mtp.N, or empty."""
    first, *rest = name.split(".")
    if first == "mtp":
        return f"mtp.{rest[0]}" if rest else ""
    return first if first in ("norm", "head") else ""
