"""Computes the memory of every action of a pipeline rank, in order.

Between actions, these items are allocated besides the rank's permanent state:

    kept        tensors that a forward keeps for its backward, by item (chunk.py)
    hidden      hidden states between two stages
    gradient    gradients of these hidden states
    gradients   fp32 gradients of weights, from a stage's first backward; after an early reduction, only a shard
    leaving     the last tensors that a forward copied to the host, until the next action ends
    away        the same tensors on the device again, one action before their backward (parallel/pipeline/host_store.py)

torch's stage holds a chunk's input and output until the chunk's backward ends. If one rank has the first
and the last stage, they share one embedding table and its gradient. gloo holds sent tensors until the step ends.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache

from parallel.pipeline.orders import Action
from parallel.pipeline.simulate import what_runs
from train.plan.memory.chunk import ChunkMemory
from train.plan.memory.part import PassMemory


@dataclass(frozen=True)
class MemoryPeak:
    """The moment with the most live bytes."""

    total: int = 0
    items: Counter = field(default_factory=Counter)
    event: str = ""
    in_flight: int = 0
    """Number of micro-batches that wait for backward, on all stages of the rank."""


@dataclass(frozen=True)
class StagePlan:
    """Memory facts of one of the rank's stages."""

    chunk: ChunkMemory
    gradients: int
    """Bytes of the stage's weight gradients, without the embedding's."""
    table: int
    """Bytes of the embedding's gradient; 0 without the embedding."""
    one_piece: bool = False
    """Whether backward cannot be split. If so, action I runs the complete backward, and action W does nothing."""


class WalkDepth(IntEnum):
    """Passes that a `ScheduleWalk` measures. With fewer passes, its peak is a lower bound."""

    forwards = 0
    """Measure only forward passes.

    After the first half of a split backward, all tensors that the forward kept still count.
    """

    settled = 1
    """Measure all passes except those that allocate gradients."""
    whole = 2
    """Measure all passes."""


SENT = -1
"""Stands for gloo in the holders of a tensor. All other holders are stage indices."""


class ScheduleWalk:
    """Follows a pipeline rank's memory through the actions of a step."""

    def __init__(
        self,
        stages: dict[int, StagePlan],
        num_stages: int,
        holds_sent: bool,
        depth: WalkDepth,
        ahead: Mapping[int, tuple[int, int]],
    ):
        """holds_sent: whether sent tensors stay in memory until the step ends
        ahead: for each stage with an early reduction, the reduction's peak and the bytes after it (step_end.py)

        Both numbers are relative to the bytes before the reduction.
        """
        self._ahead, self._left = ahead, Counter()
        self._stages, self._last, self._holds_sent, self._depth = stages, num_stages - 1, holds_sent, depth
        self._alive: dict[tuple[str, int, int], Counter] = {}
        """Bytes of live items by kind, stage and micro-batch. Items between two stages count for the later stage.

        Code may replace a Counter in this dict, but must not change it, because `_peak` refers to it.
        """
        self._bytes: dict[tuple[str, int, int], int] = {}
        self._total = 0
        self._holders: defaultdict[tuple[str, int, int], set[int]] = defaultdict(set)
        self._made: set[int] = set()
        """Stages whose gradients are allocated."""
        self._table_made = False
        self._gradients = 0
        self._peak: tuple = 0, 0, 0, {}, None, 0
        """The peak: its total bytes, bytes outside of passes, bytes of gradients, live items, the action, and the
        number of forward passes in this action."""
        self._leaving: list[tuple[str, int, int]] = []
        """Items that the previous action added, and that are removed when the current action ends."""
        self._host = 0
        self.host_peak = 0
        """Peak bytes of host memory."""

    def run(self, actions: Sequence[Action]) -> MemoryPeak:
        """Goes through all actions, and returns the peak."""
        lines = [
            [part for part in action.halves[::-1] or (action,) if self._kind(part)]  # the backward of a pair runs first
            for action in actions
        ]
        self._left.update(part.stage for parts in lines for part in parts if self._kind(part) in "BW")
        busy = [(action, parts) for action, parts in zip(actions, lines, strict=True) if parts]
        for (action, parts), (_, following) in zip(busy, [*busy[1:], (None, ())], strict=True):
            leaving, self._leaving = self._leaving, []
            for part in (*following, *parts):
                self._fetch(part)
            for part in parts:
                self._receive(part)
            self._play(action, parts)
            for part in parts:
                self._finish(part)
            for key in leaving:
                self._take(key)
            for part in parts:
                self._reduce_ahead(part)
        return self._described()

    def _reduce_ahead(self, action: Action) -> None:
        """Reduce a stage's gradients after its last backward, if the stage has an early reduction."""
        self._left[action.stage] -= self._kind(action) in "BW"
        if self._left[action.stage] or action.stage not in self._ahead:
            return
        most, stays = self._ahead[action.stage]
        total = self._gradients + self._total
        if total + most > self._peak[0]:
            self._peak = total + most, total, self._gradients, dict(self._alive), action, 0
        self._gradients += stays

    def _fetch(self, action: Action) -> None:
        """Before a backward, copies from the host the offloaded tensors that this backward needs first."""
        stage, m = action.stage, action.micro_batch
        chunk = self._stages[stage].chunk
        if self._kind(action) not in ("B", "I") or ("kept", stage, m) not in self._alive or not chunk.sent_last:
            return
        if ("away", stage, m) not in self._alive:
            self._take(("leaving", stage, m))
            self._put(("away", stage, m), Counter(activations=chunk.sent_last))
            self._host -= chunk.host_bytes[1]

    def _kind(self, action: Action) -> str:
        return what_runs(action, self._stages[action.stage].one_piece)

    def _receive(self, action: Action) -> None:
        """Receive hidden states, or their gradient, from another rank."""
        stage, m = action.stage, action.micro_batch
        chunk = self._stages[stage].chunk
        if self._kind(action) == "F" and stage > 0:
            self._hold("hidden", stage, m, chunk.hidden, stage)
        if self._kind(action) in ("B", "I") and stage < self._last:
            self._hold("gradient", stage + 1, m, chunk.hidden, stage)

    def _play(self, action: Action, parts: Sequence[Action]) -> None:
        """Computes an action's peak, and updates the highest peak."""
        if self._depth < WalkDepth.whole and any(self._is_first(part) for part in parts):
            return
        peak = total = self._gradients + self._total
        if self._depth > WalkDepth.forwards or all(self._kind(part) == "F" for part in parts):
            lanes = [self._pass(part) for part in parts]
            below = total - sum(self._bytes[key] for part in parts for key in self._counted(part))
            peak = below + _highest(lanes)
        if peak > self._peak[0]:
            forwards = sum(self._kind(part) == "F" for part in parts)
            self._peak = peak, total, self._gradients, dict(self._alive), action, forwards

    def _described(self) -> MemoryPeak:
        peak, total, gradients, alive, action, forwards = self._peak
        if action is None:
            return MemoryPeak()
        items: Counter = Counter(gradients=gradients)
        for one in alive.values():
            items += one
        items["workspace"] += peak - total
        waiting = sum(kind == "kept" for kind, _, _ in alive)
        return MemoryPeak(peak, items, _name(action), waiting + forwards)

    def _put(self, key: tuple[str, int, int], items: Counter) -> None:
        self._take(key)
        self._alive[key], self._bytes[key] = items, sum(items.values())
        self._total += self._bytes[key]

    def _take(self, key: tuple[str, int, int]) -> None:
        if key in self._alive:
            self._total -= self._bytes.pop(key)
            del self._alive[key]

    def _counted(self, action: Action) -> Iterator[tuple[str, int, int]]:
        """Returns the keys of the live items that the measured memory of the action's pass already includes."""
        stage, m = action.stage, action.micro_batch
        keys = [("hidden", stage, m)]
        if self._kind(action) != "F":
            keys += [("kept", stage, m), ("away", stage, m), ("hidden", stage + 1, m), ("gradient", stage + 1, m)]
        return (key for key in keys if key in self._alive)

    def _pass(self, action: Action) -> PassMemory:
        first = self._is_first(action)
        return _pass(self._stages[action.stage].chunk, self._kind(action), first, first and not self._table_made)

    def _is_first(self, action: Action) -> bool:
        """Whether the action allocates the gradients of its stage."""
        return self._kind(action) in "BW" and action.stage not in self._made

    def _finish(self, action: Action) -> None:
        stage, m, kind = action.stage, action.micro_batch, self._kind(action)
        plan = self._stages[stage]
        hidden = plan.chunk.hidden
        if kind == "F":
            self._put(("kept", stage, m), plan.chunk.kept)
            if plan.chunk.sent_last:
                self._leaving.append(("leaving", stage, m))
                self._put(self._leaving[-1], Counter(activations=plan.chunk.sent_last))
                self._host += plan.chunk.host_bytes[0]
                self.host_peak = max(self.host_peak, self._host)
            if stage < self._last:
                self._hold("hidden", stage + 1, m, hidden, stage)
                self._send("hidden", stage + 1, m, stage + 1)
            return
        if kind in "BI" and stage > 0:
            self._hold("gradient", stage, m, hidden, stage - 1 if stage - 1 in self._stages else stage)
            self._send("gradient", stage, m, stage - 1)
            if stage - 1 not in self._stages:
                self._let_go("gradient", stage, m, stage)
        if ("away", stage, m) in self._alive:
            self._take(("away", stage, m))
            whole, last = plan.chunk.host_bytes
            self._host -= whole - last
        if kind == "I" and self._depth == WalkDepth.forwards:
            self._put(("kept", stage, m), plan.chunk.kept + Counter(activations=plan.chunk.sent_bytes))
            return
        if kind == "I":
            start = _pass(plan.chunk, "W", False, False).start
            kept = Counter(self._alive["kept", stage, m])
            kept["activations"] += start - sum(self._bytes[key] for key in self._counted(action))
            self._put(("kept", stage, m), kept)
            return
        if stage not in self._made:
            self._made.add(stage)
            self._gradients += plan.gradients + (0 if self._table_made else plan.table)
            self._table_made |= plan.table > 0
        self._take(("kept", stage, m))
        for name, border in (("hidden", stage), ("hidden", stage + 1), ("gradient", stage + 1)):
            self._let_go(name, border, m, stage)

    def _hold(self, name: str, border: int, m: int, size: int, holder: int) -> None:
        key = name, border, m
        self._holders[key].add(holder)
        if key not in self._alive:
            self._put(key, Counter(in_flight=size))

    def _let_go(self, name: str, border: int, m: int, holder: int) -> None:
        key = name, border, m
        if key in self._holders:
            self._holders[key].discard(holder)
            if not self._holders[key]:
                del self._holders[key]
                self._take(key)

    def _send(self, name: str, border: int, m: int, to: int) -> None:
        if self._holds_sent and to not in self._stages:
            self._holders[name, border, m].add(SENT)


@lru_cache(maxsize=4096)
def _pass(chunk: ChunkMemory, kind: str, first: bool, table_first: bool) -> PassMemory:
    if kind == "F":
        return chunk.forward
    if kind == "B":
        return chunk.backward(first, table_first)
    return chunk.split(first)[kind == "W"]


def _highest(lanes: Sequence[PassMemory]) -> int:
    """Returns the peak of one pass, or of two passes that alternate after each section."""
    now = [lane.start for lane in lanes]
    left = [list(lane.pieces) for lane in lanes]
    highest, turn = sum(now), 0
    while any(left):
        if left[turn]:
            piece = left[turn].pop(0)
            highest = max(highest, sum(now) - now[turn] + piece.peak)
            now[turn] = piece.end
        turn = (turn + 1) % len(lanes)
    return highest


def _name(action: Action) -> str:
    """Describes an action, for example: forward of stage 3, micro-batch 12."""
    kinds = {"F": "forward", "B": "backward", "I": "backward of inputs", "W": "backward of weights"}
    if action.halves:
        return " beside ".join(map(_name, action.halves))
    return f"{kinds[action.kind]} of stage {action.stage}, micro-batch {action.micro_batch}"
