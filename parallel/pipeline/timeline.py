"""Records the times of each action of a step on this rank, and so measures the pipeline's bubble in the run itself.

CUDA events mark the times; on CPU, a clock is read. The bubble is the fraction of the step without an action: bubble =
1 - busy / span.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch


@dataclass(frozen=True)
class ActionRecord:
    """One action of one step."""

    kind: str
    """F (forward), B (backward), I (backward of inputs), W (backward of weights) or FB (overlapped pair)."""
    stage: int
    """Index of the stage. For FB, the stage of the forward."""
    micro_batch: int
    """Index of the micro-batch. For FB, the micro-batch of the forward."""
    start: float
    """Seconds since the step began on this rank."""
    seconds: float
    backward: tuple[int, int] | None = None
    """For FB: stage and micro-batch of the backward; otherwise None."""


@dataclass
class StepRecord:
    """All actions of one step on one rank, in order."""

    actions: list[ActionRecord] = field(default_factory=list)
    span: float = 0.0
    """Seconds from start to end of the step on this rank."""

    @property
    def busy(self) -> float:
        """Number of seconds in which this rank ran an action."""
        return sum(action.seconds for action in self.actions)

    @property
    def bubble(self) -> float:
        """Fraction of the step in which this rank ran no action."""
        return 1 - self.busy / self.span if self.span > 0 else 0.0

    def seconds(self, *kinds: str) -> float:
        """Return the seconds in which actions of these kinds ran."""
        return sum(action.seconds for action in self.actions if action.kind in kinds)


Moment = TypeVar("Moment")


class _Clock(Protocol[Moment]):
    """Reads times, and measures the seconds between two of them."""

    def now(self) -> Moment: ...

    def known(self, mark: Moment) -> bool: ...

    def between(self, first: Moment, second: Moment) -> float: ...

    def reuse(self, marks: list[Moment]) -> None: ...


_Mark = tuple[str, int, int, tuple[int, int] | None, Moment, Moment]
# Tuples of kind, stage, micro_batch, backward (as in ActionRecord), and the action's start and end.


class Timeline(Generic[Moment]):
    """Records the actions of the steps of one rank."""

    def __init__(self, clock: _Clock[Moment]):
        self._clock = clock
        self._open: list[_Mark[Moment]] = []
        self._pending: list[tuple[Moment, Moment, list[_Mark[Moment]]]] = []
        self._newest = StepRecord()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Record the block as one complete step of the schedule."""
        self._open, begin = [], self._clock.now()
        yield
        self._pending.append((begin, self._clock.now(), self._open))
        self._settle()

    @contextmanager
    def action(
        self, kind: str, stage: int, micro_batch: int, backward: tuple[int, int] | None = None
    ) -> Iterator[None]:
        """Record the block as one action. Arguments as in ActionRecord."""
        start = self._clock.now()
        yield
        self._open.append((kind, stage, micro_batch, backward, start, self._clock.now()))

    def newest(self) -> StepRecord:
        """Return the newest step whose times are known. On CUDA, the last step's times may be unknown yet."""
        self._settle()
        return self._newest

    def _settle(self) -> None:
        while self._pending and self._clock.known(self._pending[0][1]):
            begin, end, marks = self._pending.pop(0)
            between = self._clock.between
            self._newest = StepRecord(
                [ActionRecord(k, s, m, between(begin, t0), between(t0, t1), b) for k, s, m, b, t0, t1 in marks],
                between(begin, end),
            )
            self._clock.reuse([begin, end, *(mark for *_, t0, t1 in marks for mark in (t0, t1))])


class _WallClock:
    """Times on a CPU, in seconds: readings of Python's monotonic clock."""

    def now(self) -> float:
        return time.perf_counter()

    def known(self, mark: float) -> bool:
        return True

    def between(self, first: float, second: float) -> float:
        return second - first

    def reuse(self, marks: list[float]) -> None:
        pass


class _EventClock:
    """A clock with reused CUDA events on the current stream."""

    def __init__(self):
        self._free: list[torch.cuda.Event] = []

    def now(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def known(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def between(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        return first.elapsed_time(second) / 1000

    def reuse(self, marks: list[torch.cuda.Event]) -> None:
        self._free += marks


def timeline_of(device: torch.device) -> Timeline[float] | Timeline[torch.cuda.Event]:
    """Return a timeline with a clock for this device."""
    return Timeline(_EventClock()) if device.type == "cuda" else Timeline(_WallClock())
