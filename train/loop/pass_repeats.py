"""A step whose loss or gradient norm is out of its history: its forward and backward run again before the update, and are compared.

A flipped bit in an activation, a gradient or a product makes no error. Where it is large enough to show in the loss or the norm, doing the
passes again tells what it was, as they repeat bit by bit (cluster.deterministic):

    both runs equal             the data, or weights that are wrong on every copy; the update is made
    different, a third equal    a bit that flipped once: named by rank, layer and phase; the update is made of the later runs
    different again             a device that computes wrong: the run ends with its rank

Every step leaves sums of the bits (train/loop/replicas.py) of the outputs of attention and of blocks, of their gradients and of the gradients of
weights, by rank; they stay on the device until there is doubt. The first that differs in the order of the passes is where it began: later
layers, other stages and the ranks of experts only took what came. In the runs that follow experts are watched, too.

Out of its history: so many usual spreads above the median of the last steps. The spread is 1.48 times the median distance from the median, as
of a normal distribution, and at least a hundredth of the loss and 5 % of the norm, which is taken as a logarithm.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from conf.errors import EXIT_CRASH, RunEnded
from parallel.exchange import gather
from parallel.mesh import Layout
from parallel.shard import Shard
from train.loop.measure import CollectedMeasures
from train.loop.nonfinite import SHOWN_TENSORS, shown_ranks
from train.loop.pass_watch import PassWatch, PlainSightings, Sighting, layers_in_order
from train.loop.replicas import ReplicaCheck, sum_of_bits
from train.model.deepseek import DeepSeekV3
from train.model.moe import Experts, MoE
from train.parallelize import ParallelModel
from train.rank import RankSetup

SumKey = TypeVar("SumKey")
HISTORY_STEPS, LEAST_STEPS = 100, 16
"""Steps of the history, and how many it takes at least."""
PAUSED_STEPS = 20
"""Steps without doubt behind one that was the data's: where the history has ended for good, not every step is done twice."""


class DeviceUnsteady(RunEnded):
    """A rank computed the same passes three times, each time with another result; no update was made."""

    code = EXIT_CRASH


class UsualRange:
    """What a number of a step was in the last steps. least: the spread that is always allowed, of a median."""

    def __init__(self, above: float, least: Callable[[float], float]):
        self._above, self._least = above, least
        self._kept: deque[float] = deque(maxlen=HISTORY_STEPS)

    def take(self, value: float) -> None:
        self._kept.append(value)

    def spreads_above(self, value: float) -> float | None:
        """How many usual spreads a value lies above the median, where that is too many."""
        if len(self._kept) < LEAST_STEPS:
            return None
        middle = statistics.median(self._kept)
        spread = max(1.4826 * statistics.median(abs(one - middle) for one in self._kept), self._least(middle))
        found = (value - middle) / spread
        return found if found > self._above else None


class PassSums(PassWatch):
    """Sums of the bits of what one run of the passes computes on this rank. closely: experts and routers too."""

    def __init__(self, chunks: Sequence[DeepSeekV3], closely: bool):
        super().__init__(chunks)
        self._closely = closely
        self._experts: tuple[Sighting, Sighting] | None = None
        self._layers = {id(module) for chunk in chunks for _, module, _ in layers_in_order(chunk)}
        self._first = {id(next(iter(chunk.layers.values()))) for chunk in chunks if chunk.layers}
        self.values: dict[Sighting, list[Tensor]] = {}
        self.gradients: dict[Sighting, list[Tensor]] = {}
        self.weights: dict[str, list[Tensor]] = {}
        """Gradients of weights before they are reduced."""
        self.reduced: dict[str, list[Tensor]] = {}
        """Gradients of this rank's shard when they are reduced."""
        self.sums = (math.nan, math.nan)
        """Loss and gradient norm over all ranks."""
        self.loss: float | None = None
        """This rank's own, where it has the head."""

    def watch(self, name: str, module: nn.Module, start: Sighting, end: Sighting) -> None:
        part = name.rpartition(".")[2]
        if isinstance(module, Experts):
            self._experts = start, end
            return
        if self._closely and isinstance(module, MoE):
            assert self._experts is not None, "children come before their parents"
            self._watch_experts(module, *self._experts)
        if id(module) in self._first or (self._closely and part in ("moe", "ffn", "router")):
            super().watch(name, module, start, end)
        elif id(module) in self._layers or part == "attention":
            self.handles.append(module.register_forward_hook(lambda _, __, output: self.see(output, end)))

    def see_value(self, at: Sighting, value: Tensor) -> None:
        self.values.setdefault(at, []).append(sum_of_bits(value))

    def see_gradient(self, at: Sighting, gradient: Tensor) -> None:
        self.gradients.setdefault(at, []).append(sum_of_bits(gradient))

    def see_weight(self, name: str, gradient: Shard) -> None:
        """Look at what this rank adds to the gradient of a weight."""
        self.weights.setdefault(name, []).append(sum_of_bits(gradient.local))

    def _watch_experts(self, moe: MoE, start: Sighting, end: Sighting) -> None:
        run = moe.run_experts

        def watched(routed: Any) -> Tensor:
            self.see(routed.rows_RD, start)
            out_RD = run(routed)
            self.see(out_RD, end)
            return out_RD

        moe.run_experts = watched
        self.handles.append(_Restored(moe))


@dataclass
class _Restored:
    """Gives a module of experts its method back."""

    moe: MoE

    def remove(self) -> None:
        del self.moe.run_experts


@dataclass(frozen=True)
class RankDifference(PlainSightings):
    """Where two runs of the same passes differ on one rank first."""

    rank: int
    forward: Sighting | None = None
    backward: Sighting | None = None
    weights: list[str] = field(default_factory=list)
    reduced: list[str] = field(default_factory=list)
    sums: bool = False
    """Whether loss or norm of all ranks differ."""
    loss: float | None = None
    """The rank's own in the later run."""

    @classmethod
    def between(cls, rank: int, one: PassSums, other: PassSums) -> "RankDifference":
        forward, backward = _differing(one.values, other.values), _differing(one.gradients, other.gradients)
        return cls(
            rank,
            min(forward, default=None),
            max(backward, default=None),
            sorted(_differing(one.weights, other.weights))[:SHOWN_TENSORS],
            sorted(_differing(one.reduced, other.reduced))[:SHOWN_TENSORS],
            one.sums != other.sums,
            other.loss,
        )


def _differing(one: dict[SumKey, list[Tensor]], other: dict[SumKey, list[Tensor]]) -> list[SumKey]:
    """What both have and what is not the same in both. Waits for the device."""
    both = [key for key in one if key in other]
    odd = [key for key in both if len(one[key]) != len(other[key])]
    even = [key for key in both if len(one[key]) == len(other[key]) > 0]
    if even:
        mine, theirs = (torch.stack([value for key in even for value in sums[key]]).tolist() for sums in (one, other))
        place = 0
        for key in even:
            end = place + len(one[key])
            odd += [key] if mine[place:end] != theirs[place:end] else []
            place = end
    return odd


@dataclass(frozen=True)
class FirstDifference:
    """Where two runs of the passes of all ranks began to differ."""

    ranks: tuple[int, ...]
    """More than one where it is one of them."""
    phase: str
    where: str

    @property
    def text(self) -> str:
        whom = shown_ranks(self.ranks) if len(self.ranks) == 1 else f"one of {shown_ranks(self.ranks)}"
        return f"{whom}, {self.phase}, {self.where}"


def first_difference(seen: Sequence[RankDifference], layout: Layout, moe: Iterable[str]) -> FirstDifference | None:
    """The first in the order of the passes; None where all is equal. moe: names of the layers of experts."""
    orders: tuple[tuple[str, str, Callable], ...] = (
        ("forward", "forward pass", min),
        ("backward", "backward pass", max),
    )
    for name, phase, first in orders:
        places = {each.rank: at for each in seen if (at := getattr(each, name)) is not None}
        if places:
            at = first(places.values())
            ranks = {rank for rank, mine in places.items() if mine == at}
            where = at.name if name == "forward" else f"the gradient of {at.name}"
            if layout.ep > 1 and _ends_experts(at, name, moe):
                ranks |= {rank for group in layout.ep_groups() if ranks & {*group} for rank in group}
                where += ", whose experts are on these ranks"
            return FirstDifference(tuple(sorted(ranks)), phase, where)
    for name, phase in (("weights", "backward pass"), ("reduced", "reduction of the gradients")):
        if ranks := tuple(each.rank for each in seen if getattr(each, name)):
            names = sorted({weight for each in seen for weight in getattr(each, name)})[:SHOWN_TENSORS]
            return FirstDifference(ranks, phase, f"the gradient of {', '.join(names)}")
    if any(each.sums for each in seen):
        return FirstDifference(tuple(each.rank for each in seen), "sums over ranks", "loss or gradient norm")
    return None


def _ends_experts(at: Sighting, phase: str, moe: Iterable[str]) -> bool:
    """Whether what lies between this place and the one before it in the pass is on the ranks of the experts."""
    name = at.name.removeprefix("the output of ")
    return any(
        name == (layer if phase == "forward" else f"{layer}.attention") or name == f"{layer}.block.attention"
        for layer in moe
    )


class Doubt(Enum):
    """What a step turned out to be that was done again; its value says it."""

    data = "done again it is the same on all ranks, bit by bit: it is in the data or in all copies of the weights, and no flipped bit"
    once = "a bit flipped once"
    unsteady = "the passes do not repeat on any rank, so that they cannot be compared"


@dataclass(frozen=True)
class RepeatedStep:
    """What to tell of a step that was done again."""

    doubt: Doubt
    ranks: tuple[int, ...]
    """Where it began; of the data the rank whose loss is the largest."""
    text: str


class PassRepeats:
    """Doubts steps of one rank, as all ranks do at once, and judges what doing them again shows. above: see `log.repeat_above`."""

    def __init__(
        self, above: float, parts: ParallelModel, rank: RankSetup, replicas: ReplicaCheck | None, moe: Sequence[str]
    ):
        """replicas: compares weights of which a step was made that is doubted."""
        self._parts, self._mesh, self._replicas, self._moe = parts, rank.mesh, replicas, moe
        self.on = above > 0
        self._ranges = UsualRange(above, lambda loss: 0.01 * abs(loss)), UsualRange(above, lambda _: 0.05)
        self._runs: list[PassSums] = []
        self._why, self._pause = "", 0
        self._first = FirstDifference((), "", "")
        """Between the first two runs."""
        self.found: RepeatedStep | None = None
        """What came of doing the last step again, where that was done."""

    def start(self) -> None:
        """Call before the passes of a new step."""
        self._runs.clear()
        self.found, self._pause = None, max(0, self._pause - 1)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A run of the passes, and the end of what this rank adds to gradients."""
        if not self.on:
            yield
            return
        sums, zero = PassSums(self._parts.chunks, closely=bool(self._runs)), self._parts.zero
        self._runs.append(sums)
        zero.local_observer = sums.see_weight
        try:
            with sums:
                yield
        finally:
            zero.local_observer = None

    def doubts(self, step: int, collected: CollectedMeasures, norm: float) -> bool:
        """Whether the passes are to be done again before an update is made of them; call on all ranks once they have the norm. Raises DeviceUnsteady,
        and ReplicasDiffer."""
        if not self.on:
            return False
        loss, run = collected.read().main_loss, self._runs[-1]
        scaled = loss, math.log(max(norm, 1e-30))
        if len(self._runs) == 1 and not self._is_out((loss, norm), scaled):
            self._take(scaled)
            return False
        for name, gradient in self._parts.zero.reduced_gradients():
            run.reduced.setdefault(name, []).append(sum_of_bits(gradient))
        run.sums, run.loss = (loss, norm), self._own_loss()
        if len(self._runs) == 1:
            if self._replicas is not None:
                self._replicas.compare(step)
            return True
        again = self._compare(step)
        if not again:
            self._take(scaled)
        return again

    def _take(self, scaled: tuple[float, float]) -> None:
        for usual, value in zip(self._ranges, scaled, strict=True):
            usual.take(value)

    def _own_loss(self) -> float | None:
        last = next((chunk for chunk in self._parts.chunks if chunk.has_head), None)
        return None if last is None else float(last.losses.means()[0])

    def _is_out(self, values: tuple[float, float], scaled: tuple[float, float]) -> bool:
        told = [
            f"{what} {value:.4g} is {spreads:.0f} usual spreads above its median"
            for what, value, usual, one in zip(("loss", "gradient norm"), values, self._ranges, scaled, strict=True)
            if (spreads := usual.spreads_above(one)) is not None
        ]
        self._why = " and ".join(told)
        return bool(told) and not self._pause

    def _compare(self, step: int) -> bool:
        """Compare the last two runs; returns whether a third is needed."""
        mine = RankDifference.between(self._mesh.rank, *self._runs[-2:])
        seen = [RankDifference.from_plain(plain) for plain in gather(mine.plain())]
        differs = first_difference(seen, self._mesh.layout, self._moe if len(self._runs) == 2 else ())
        third = len(self._runs) > 2
        if differs is None and not third:
            self._pause = PAUSED_STEPS
            losses = {each.loss: each.rank for each in seen if each.loss is not None}
            self._find(step, Doubt.data, (losses[max(losses)],), Doubt.data.value)
        elif differs is None:
            self._find(
                step,
                Doubt.once,
                self._first.ranks,
                f"{Doubt.once.value}: {self._first.text}; two more runs of the passes were equal, and the update is made of them",
            )
        elif self._mesh.layout.dp > 1 and len(differs.ranks) == self._mesh.layout.stage_ranks:
            self.on = False
            self._find(step, Doubt.unsteady, (), f"{Doubt.unsteady.value}; log.repeat_above is off from here on")
            return False
        elif third:
            raise DeviceUnsteady(
                f"step {step}: {self._why}; the same passes came out differently three times: {differs.text}. No update was made of them; take the "
                "device out, and go on from the last checkpoint",
                differs.ranks,
            )
        else:
            self._first = differs
            return True
        return False

    def _find(self, step: int, doubt: Doubt, ranks: tuple[int, ...], text: str) -> None:
        self.found = RepeatedStep(doubt, ranks, f"step {step}: {self._why}; {text}")
