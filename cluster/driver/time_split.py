"""How a run used its wall time, from the events of its driver (cluster/driver/journal.py). The parts add up to the time in which a driver ran:

    waiting     for nodes: from the start of the driver, and from an event `waiting`, to the next attempt
    start       of a launch's first attempt, until its first step is done
    training    steps that last
    detection   from the last news of the ranks to the cause of a failure, the step that broke among it
    restart     from the cause, or from the wish to go on with other nodes, to the first step of the next attempt, waiting aside
    again       steps that the run had done before

Nobody wanted training between two launches, so that time is no part. Effective time is training on as many ranks as the run wants: time on half
of them counts half. Spare nodes that wait are held as well; what they cost says `held_share`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class TimePart(StrEnum):
    """What a run's wall time goes into, as the top of this file defines it; in the order in which it is shown."""

    training = "training"
    again = "again"
    start = "start"
    detection = "detection"
    restart = "restart"
    waiting = "waiting"


STEPPING = (TimePart.training, TimePart.again)


@dataclass
class TimeSplit:
    """Seconds of a run by part, over all its launches."""

    seconds_in: dict[TimePart, float] = field(default_factory=lambda: dict.fromkeys(TimePart, 0.0))
    spans: list[tuple[float, float]] = field(default_factory=list)
    """Unix times between which steps that last were made."""
    attempts: int = 0
    nodes: int = 0
    """Nodes with ranks in the newest attempt."""
    spares: int = 0
    effective_seconds: float = 0.0
    """Training, weighted by the share of the wanted ranks that did it."""
    held_seconds: float = 0.0
    """All seconds, weighted by the nodes that the attempt held, spares included, over those that the whole run needs."""

    @property
    def seconds(self) -> float:
        """In which a driver ran."""
        return sum(self.seconds_in.values())

    @property
    def downtime_seconds(self) -> float:
        """Without steps, starts included."""
        return sum(seconds for part, seconds in self.seconds_in.items() if part not in STEPPING)

    @property
    def share(self) -> float:
        """The share of the time in which there were steps; 1 is best."""
        return 1 - self.downtime_seconds / self.seconds if self.seconds > 0 else 0.0

    @property
    def effective_share(self) -> float:
        """Training time times ranks at work over ranks wanted, over all time; 1 is best."""
        return self.effective_seconds / self.seconds if self.seconds > 0 else 0.0

    @property
    def held_share(self) -> float:
        """Effective time over all nodes that the run held, spares included."""
        return self.effective_seconds / self.held_seconds if self.held_seconds > 0 else 0.0


class _Clockwork:
    """Goes through events and gives each stretch of time to a part."""

    def __init__(self) -> None:
        self.split = TimeSplit()
        self._part: TimePart | None = None
        self._since = 0.0
        self._weight = self._held = 1.0
        self._world, self._first = 0, True
        self._asked_at: float | None = None
        """When the attempt was asked to stop for the next."""
        self._failed: tuple[float, bool] | None = None
        """When the newest failure was told, and whether it said since when."""

    def switch(self, now: float, part: TimePart | None) -> None:
        """The part that began last ends now, and another begins."""
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
        self.switch(before, None)  # the launch before, if it did not say that it ended
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
        failed, told = self._failed or (now, True)
        if not told and (late := max(0.0, event["seconds"] - (now - failed))):  # as earlier versions told of hangs
            self.split.seconds_in[TimePart.training] -= late
            self.split.effective_seconds -= late
            self.split.seconds_in[TimePart.detection] += late
        self.switch(now, TimePart.again if told and event.get("steps_again") else TimePart.training)


def split_time(events: Iterable[dict[str, Any]], now: float | None = None) -> TimeSplit:
    """Add up the events of a run. now: Unix time while it runs; None if the last event was its end."""
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
