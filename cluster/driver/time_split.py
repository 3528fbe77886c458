"""Computes how a run used its wall time from the driver's events (cluster/driver/journal.py).

The time in which a driver ran is divided into these parts:

    waiting     the driver waits for nodes: from its start, or from an event `waiting`, to the next attempt
    start       from a launch's first attempt to its first complete step
    training    steps whose result the run kept
    detection   from the last news of the ranks until the driver names the cause of a failure, including the failed step
    restart     from the end of detection, or from the decision to change the nodes, to the next attempt's first step
    again       steps that the run repeated

Effective time is training time x working ranks / all wanted ranks.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class TimePart(StrEnum):
    """Parts of a run's wall time in display order."""

    training = "training"
    again = "again"
    start = "start"
    detection = "detection"
    restart = "restart"
    waiting = "waiting"


STEPPING = (TimePart.training, TimePart.again)


@dataclass
class TimeSplit:
    """A run's wall time, divided into parts, summed over all launches."""

    seconds_in: dict[TimePart, float] = field(default_factory=lambda: dict.fromkeys(TimePart, 0.0))
    spans: list[tuple[float, float]] = field(default_factory=list)
    """Intervals of training steps that the run kept, in Unix time."""
    attempts: int = 0
    nodes: int = 0
    """Number of nodes with ranks in the newest attempt."""
    spares: int = 0
    effective_seconds: float = 0.0
    """Effective training time: training seconds x working ranks / wanted ranks."""
    held_seconds: float = 0.0
    """Time of occupied nodes: driver seconds x max(1, occupied nodes including spares / nodes of the full layout)."""

    @property
    def seconds(self) -> float:
        """Seconds in which a driver ran."""
        return sum(self.seconds_in.values())

    @property
    def downtime_seconds(self) -> float:
        """Seconds without training steps: waiting, start, detection and restart."""
        return sum(seconds for part, seconds in self.seconds_in.items() if part not in STEPPING)

    @property
    def share(self) -> float:
        """Fraction of the time with steps, also repeated steps; 1 is best."""
        return 1 - self.downtime_seconds / self.seconds if self.seconds > 0 else 0.0

    @property
    def effective_share(self) -> float:
        """Effective training time divided by all time; 1 is best."""
        return self.effective_seconds / self.seconds if self.seconds > 0 else 0.0

    @property
    def held_share(self) -> float:
        """Effective time / time of all occupied nodes, including spares; 1 is best."""
        return self.effective_seconds / self.held_seconds if self.held_seconds > 0 else 0.0


class _Clockwork:
    """Assigns each interval between two events to a part of the wall time (`TimePart`)."""

    def __init__(self) -> None:
        self.split = TimeSplit()
        self._part: TimePart | None = None
        self._since = 0.0
        self._weight = self._held = 1.0
        self._world, self._first = 0, True
        self._asked_at: float | None = None
        """Time at which the driver asked the ranks to stop."""
        self._failed: tuple[float, bool] | None = None
        """Time of the newest failure event, and whether this event has the field `seconds`; None without such an event.
        """

    def switch(self, now: float, part: TimePart | None) -> None:
        """End the current part of the wall time now, and begin another one."""
        length = now - self._since
        if self._part is not None and length > 0:
            split = self.split
            split.seconds_in[self._part] += length
            split.held_seconds += length * self._held
            if self._part is TimePart.training:
                split.effective_seconds += length * self._weight
                split.spans.append((self._since, now))
        self._part, self._since = part, now

    def launch(self, now: float, before: float, event: dict[str, Any]) -> None:
        self.switch(before, None)  # ends the previous launch, if that launch did not log its end
        self.switch(now, TimePart.waiting)
        self._world, self._first, self._weight, self._held = event.get("world") or 0, True, 1.0, 1.0

    def attempt(self, now: float, event: dict[str, Any]) -> None:
        if self._asked_at is not None and self._part in STEPPING:
            self.switch(max(self._since, self._asked_at), TimePart.restart)
        self.switch(now, TimePart.start if self._first else TimePart.restart)
        self._first, self._asked_at = False, None
        nodes, spares = len(event.get("nodes", [])), len(event.get("spares", []))
        self.split.attempts, self.split.nodes, self.split.spares = self.split.attempts + 1, nodes, spares
        ranks = event.get("pp", 0) * event.get("dp", 0)
        self._weight = min(1.0, ranks / self._world) if ranks and self._world else 1.0
        self._held = max(1.0, self._weight * (nodes + spares) / nodes) if nodes else 1.0

    def fail(self, now: float, event: dict[str, Any]) -> None:
        if self._part in STEPPING:
            self.switch(max(self._since, now - event.get("seconds", 0.0)), TimePart.detection)
        self.switch(now, TimePart.restart)
        self._asked_at, self._failed = None, (now, "seconds" in event)

    def recover(self, now: float, event: dict[str, Any]) -> None:
        failed, reported = self._failed or (now, True)
        # Earlier versions did not report the time of a hang in the failure event, so it is computed here.
        if not reported and (late := max(0.0, event["seconds"] - (now - failed))):
            self.split.seconds_in[TimePart.training] -= late
            self.split.effective_seconds -= late
            self.split.seconds_in[TimePart.detection] += late
        self.switch(now, TimePart.again if reported and event.get("steps_again") else TimePart.training)


def split_time(events: Iterable[dict[str, Any]], now: float | None = None) -> TimeSplit:
    """Add up the times of events. now: Unix time; None if the run has ended."""
    work, before = _Clockwork(), 0.0
    for event in events:
        time = event["time"]
        match event["kind"]:
            case "launch":
                work.launch(time, before, event)
            case "attempt":
                work.attempt(time, event)
            case "first_step" if work._part not in STEPPING:
                work.switch(time, TimePart.training)
            case "recovered":
                work.recover(time, event)
            case "caught_up" if work._part is TimePart.again:
                work.switch(time, TimePart.training)
            case "failure":
                work.fail(time, event)
            case "waiting":
                work.switch(time, TimePart.waiting)
            case "grow" | "drain" if event.get("stops", True) and work._asked_at is None:
                work._asked_at = time
            case "finish":
                work.switch(time, None)
        before = time
    work.switch(before if now is None else now, None)
    return work.split
