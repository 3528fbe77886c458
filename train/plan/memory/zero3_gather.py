"""Simulates which weights ZeRO stage 3 has gathered while each unit of the model runs.

DeepSpeed records the order of the units, such as blocks. One execution of a unit is called a visit. Before each visit,
DeepSpeed does two things (parallel/zero/private_names.py):

1. It gathers the unit's missing weights, and waits for all weights of the unit.
2. It starts to gather weights of the next units, until `limit` elements are in transfer or 2 * limit are gathered.

After a visit, the unit's weights are freed, except those already gathered for a later visit.

All weights of one gather share a buffer. At the first wait for one of these weights, DeepSpeed copies all of them out
of the buffer. It frees the buffer when it has waited for every one of them. A weight is not copied if it was gathered
alone, or if only one rank has it.

DeepSpeed waits for a unit's weights in the order of a Python set. The simulation uses the order that needs the most
memory. If another unit runs than the recorded one, DeepSpeed frees all weights in transfer.

Limits are numbers of elements; results are bytes.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple


class SharedWeight(NamedTuple):
    """A weight, and the process group that shards it."""

    elements: int
    group: str
    ranks: int
    item_bytes: int

    @property
    def shard_bytes(self) -> int:
        """Bytes of one rank's shard, padded to equal lengths."""
        return -(-self.elements // self.ranks) * self.item_bytes

    @property
    def padded_bytes(self) -> int:
        """Bytes of the weight's shards on all ranks."""
        return self.shard_bytes * self.ranks


class GatheredBytes(NamedTuple):
    """Bytes of gathered weights at one execution of a unit, such as a block."""

    fetching: int
    """Peak bytes while the unit waits for its weights."""
    working: int
    """Bytes while the unit runs."""


class _Status(Enum):
    away = 0
    coming = 1
    here = 2


@dataclass(eq=False)
class _Weight:
    """One weight. next_use: index of the last execution of a unit for which DeepSpeed has requested the weight."""

    shared: SharedWeight
    status: _Status = _Status.away
    next_use: int = -1
    size: int = 0
    """Bytes of the gathered weight outside of buffers."""


@dataclass(eq=False)
class _Gather:
    """One gather of several weights, which ends at the first wait for one of them.

    waited: weights of the gather; empty after it has ended
    copied: weights to copy out of the buffers; empty after the gather has ended
    buffers: bytes of the buffers
    """

    waited: list[_Weight]
    copied: list[_Weight] = field(default_factory=list)
    buffers: int = 0

    def arrive(self) -> None:
        for one in self.waited:
            one.status = _Status.here
        for one in self.copied:
            one.size = one.shared.elements * one.shared.item_bytes
        self.waited, self.copied = [], []


def follow_gathers(
    units: Sequence[Sequence[SharedWeight]], visits: Sequence[tuple[int, bool]], limit: int
) -> list[GatheredBytes]:
    """Returns the gathered bytes at every execution of a unit (visit).

    visits: for each visit, the unit's index in `units`, and whether the unit is finished after the visit
    """
    return _Coordinator(units, visits, limit).run(len(visits))


def follow_change(
    units: Sequence[Sequence[SharedWeight]], visits: Sequence[tuple[int, bool]], limit: int, number: int, unit: int
) -> GatheredBytes:
    """Returns the gathered bytes at an execution for which DeepSpeed has recorded another unit.

    number: index of this execution
    unit: index of the unit that really runs
    """
    coordinator = _Coordinator(units, visits, limit)
    coordinator.run(number)
    return coordinator.visit_unlearnt(unit)


class _Coordinator:
    def __init__(self, units: Sequence[Sequence[SharedWeight]], visits: Sequence[tuple[int, bool]], limit: int):
        self._units = [[_Weight(weight) for weight in unit] for unit in units]
        self._visits, self._limit = visits, limit
        self._queue = deque((weight, number) for number, (unit, _) in enumerate(visits) for weight in self._units[unit])
        self._coming: dict[_Weight, _Gather] = {}
        self._counted = 0
        """Elements that DeepSpeed counts as gathered, without padding and buffers."""

    def run(self, end: int) -> list[GatheredBytes]:
        """Returns the gathered bytes at each visit (execution of a unit) before the visit with index `end`."""
        found = []
        for number, (unit, done) in enumerate(self._visits[:end]):
            weights = self._units[unit]
            self._gather([weight for weight in weights if weight.status is _Status.away])
            highest = self._wait(weights)
            self._gather_ahead(weights, number)
            found.append(GatheredBytes(max(highest, self._size()), self._size()))
            if done:
                self._release(weights, number)
        return found

    def visit_unlearnt(self, unit: int) -> GatheredBytes:
        """Simulates the execution of another unit than the recorded one. Returns the gathered bytes.

        DeepSpeed first waits for all weights in transfer and frees them. It frees their buffers last.
        """
        highest = self._size()
        for weight, gather in self._coming.items():
            gather.arrive()
            highest = max(highest, self._size())
            weight.status, weight.size = _Status.away, 0
        self._coming.clear()
        weights = self._units[unit]
        self._gather([weight for weight in weights if weight.status is _Status.away])
        return GatheredBytes(max(highest, self._wait(weights)), self._size())

    def _gather(self, weights: list[_Weight]) -> None:
        gather = _Gather(list(weights))
        for group in {weight.shared.group: None for weight in weights}:
            members = [weight for weight in weights if weight.shared.group == group]
            if members[0].shared.ranks == 1:
                continue
            if len(members) == 1:
                members[0].size = members[0].shared.padded_bytes
            else:
                gather.copied += members
                gather.buffers += sum(weight.shared.padded_bytes for weight in members)
        for weight in weights:
            weight.status = _Status.coming
            self._coming[weight] = gather
            self._counted += weight.shared.elements

    def _wait(self, weights: list[_Weight]) -> int:
        """Simulate the wait for a unit's weights. Returns the peak bytes."""
        highest = self._size()
        coming = [weight for weight in weights if weight in self._coming]
        left = Counter(self._coming.values())  # number of weights left in each gather; at 0, its buffers are freed
        early = list({gather: weight for weight in coming if left[gather := self._coming[weight]] > 1}.values())
        # The simulation waits in the order that needs the most memory.
        for weight in [*early, *(weight for weight in coming if weight not in early)]:
            self._coming[weight].arrive()
            highest = max(highest, self._size())
            del self._coming[weight]
        return highest

    def _gather_ahead(self, weights: list[_Weight], number: int) -> None:
        for _ in range(sum(weight.next_use < number for weight in weights)):
            weight, use = self._queue.popleft()
            weight.next_use = use
        room = min(2 * self._limit - self._counted, self._limit)
        ahead: list[_Weight] = []
        while self._queue and sum(weight.shared.elements for weight in ahead) < room:
            weight, use = self._queue.popleft()
            weight.next_use = max(weight.next_use, use)
            if weight.status is _Status.away and weight not in ahead:
                ahead.append(weight)
        self._gather(ahead)

    def _release(self, weights: list[_Weight], number: int) -> None:
        for weight in weights:
            if weight.status is _Status.here and weight.next_use <= number + 1:
                weight.status, weight.size = _Status.away, 0
                self._counted -= weight.shared.elements

    def _size(self) -> int:
        buffers = {id(gather): gather.buffers for gather in self._coming.values()}
        return sum(buffers.values()) + sum(weight.size for unit in self._units for weight in unit)
