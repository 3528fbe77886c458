"""Splits the wall time of a run, over all its starts, into parts.

With a driver of cluster=ray, most parts come from the driver's events (cluster/driver/time_split.py). Other runs use
the times in starts.json and metrics.jsonl. metrics.jsonl also gives three parts that are subtracted from the training
time:

    data        waiting for data
    stall       waiting for a checkpoint, on disk or in memory
    beside      other work between steps: validation, sampled text, lines of the log

The waits of repeated steps are unknown. If a run without a driver moved to another machine, the time of its last step
counts as the end of the run.
"""

import datetime
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.clocks import SteadyClock
from cluster.driver.journal import EVENTS_FILE, read_events
from cluster.driver.time_split import TimePart, TimeSplit, split_time
from train.checkpoint.run_folder import is_held
from train.metrics.jsonl import METRICS_FILE, read_heads
from train.metrics.names import Record
from train.metrics.origin import read_starts
from train.metrics.quantities import duration

PART_WORDS = {
    "training": "steps that were not repeated",
    "again": "repeated steps",
    "start": "starts, until the first step",
    "data": "waiting for data",
    "stall": "waiting for checkpoints",
    "beside": "validation and other time between steps",
    "detection": "until the cause of a failure was named",
    "restart": "restarts after a failure",
    "waiting": "waiting for nodes",
}
"""Maps each part of a run's wall time to its description, in display order."""
TimeSpan = tuple[float, float]


@dataclass(frozen=True)
class WallTime:
    """The split of a run's wall time.

    - seconds_in: seconds of each part in PART_WORDS.
    - effective: fraction of the wall time in which the run trained. Time with too few ranks is multiplied by the
      fraction of the ranks that ran.
    """

    seconds_in: dict[str, float]
    effective: float
    starts: int

    @property
    def seconds(self) -> float:
        return sum(self.seconds_in.values())

    def rows(self) -> list[tuple[str, str, float]]:
        """Returns (name, description, fraction of the wall time) of each nonzero part."""
        whole = self.seconds or 1.0
        return [
            (part, words, self.seconds_in[part] / whole)
            for part, words in PART_WORDS.items()
            if self.seconds_in[part] > 0
        ]


def split_wall_time(run_folder: Path, now: float | None = None) -> WallTime | None:
    """Splits a run's wall time; None before the first start.

    now: Unix time up to which a run that still trains is counted. By default, it is the current time if the run trains
    on this machine.
    """
    if now is None and is_held(run_folder):
        now = time.time()
    metrics = run_folder / METRICS_FILE
    heads = list(read_heads(metrics)) if metrics.exists() else []
    events = read_events(run_folder)
    if events:
        split = split_time(events, now)
        trained = split.seconds_in[TimePart.training]
        weight = split.effective_seconds / trained if trained > 0 else 1.0
        seconds_in, spans, starts = (
            {str(part): value for part, value in split.seconds_in.items()},
            split.spans,
            split.attempts,
        )
    else:
        seconds_in, spans, starts = _of_starts([start["time"] for start in read_starts(run_folder)], heads, now)
        weight = 1.0
    if not sum(seconds_in.values()):
        return None
    waited = _waits(heads, spans)
    training = seconds_in["training"] - sum(waited.values())
    seconds_in = dict.fromkeys(PART_WORDS, 0.0) | seconds_in | waited | {"training": training}
    return WallTime(seconds_in, weight * training / sum(seconds_in.values()), starts)


def _of_starts(
    starts: list[float], heads: list[Record], now: float | None
) -> tuple[dict[str, float], list[TimeSpan], int]:
    """Splits the time of a run without driver events.

    Returns the seconds of each part of the wall time, the time intervals of the steps that were not repeated, and the
    number of starts.
    """
    found, spans = dict.fromkeys(("start", "training", "again"), 0.0), list[TimeSpan]()
    for place, begin in enumerate(starts):
        until = starts[place + 1] if place + 1 < len(starts) else math.inf
        mine = [head for head in heads if begin <= head.get("time", -1.0) < until]
        last = max([begin, *(head["time"] for head in mine)])
        if until < math.inf:
            # If a later start repeated the last steps of this start, that start's first record tells when this start
            # finished them.
            later = next((head for head in heads if head.get("time", -1.0) >= until), {})
            cut = (later.get("resumed") or {}).get("until") or begin
            last = max(last, cut) if cut < until else last
        elif now is not None:
            last = max(last, now)
        first = mine[0]["time"] if mine else last
        found["start"] += first - begin
        resumed = (mine[0].get("resumed") or {}) if mine else {}
        again = [head["time"] for head in mine if head["step"] <= resumed.get("step", 0) + resumed.get("again", 0)]
        caught_up = max(again, default=first)
        found["again"] += caught_up - first
        found["training"] += last - caught_up
        spans.append((caught_up, last))
    return found, spans, len(starts)


def _waits(heads: Iterable[Record], spans: list[TimeSpan]) -> dict[str, float]:
    """Returns seconds in the time intervals `spans` for three parts of the wall time: `data`, `stall` and `beside`."""
    found = dict.fromkeys(("data", "stall", "beside"), 0.0)
    for before, head, length in _pairs(heads, spans):
        steps = max(1, head["step"] - before["step"])
        step = _number(head, "step_seconds") * steps
        data = min(length, _number(head, "data_wait_seconds") * steps)
        stall = min(length - data, _number(head, "checkpoint_stall_seconds"))
        found["data"] += data
        found["stall"] += stall
        found["beside"] += max(0.0, length - stall - max(step, data))
    return found


def _pairs(heads: Iterable[Record], spans: list[TimeSpan]) -> Iterator[tuple[Record, Record, float]]:
    """Yields pairs of consecutive records in the same time interval of `spans`, and the seconds between both."""
    before: Record | None = None
    for head in heads:
        if before is not None and "time" in head and "time" in before:
            begin, end = before["time"], head["time"]
            if any(first - 1e-3 <= begin and end <= last + 1e-3 for first, last in spans):
                yield before, head, max(0.0, end - begin)
        before = head


def _number(head: Record, name: str) -> float:
    value = head.get(name, 0.0)
    return value if isinstance(value, int | float) and math.isfinite(value) else 0.0


# The split for a cluster run comes from the events that its driver writes (cluster/driver/journal.py).

EVENT_ROWS = 200
"""Maximum number of events in the report, which shows the newest."""
ROUTINE = {"checkpoint"}
"""Kinds of events that the report omits."""


ALERTS = {"straggler": "a rank is slow", "node_lost": "a node is lost"}
"""Alert text for each kind of event that sends an alert."""


class GoodputRecord:
    """Computes the cluster metrics for every step. It reads the events again when their file has grown.

    tell: gets a short text and a sentence for each new event in ALERTS.
    """

    def __init__(self, run_folder: Path, tell: Callable[[str, str], None] = lambda *_: None):
        self._folder, self._size, self._tell = run_folder, -1, tell
        self._events, self._clock = read_events(run_folder), SteadyClock()

    def __call__(self) -> Record:
        path = self._folder / EVENTS_FILE
        size = path.stat().st_size if path.exists() else -1  # no file if a full disk has refused the events
        if size != self._size:
            seen, self._events, self._size = len(self._events), read_events(self._folder), size
            for event in self._events[seen:]:
                if event["kind"] in ALERTS:
                    self._tell(ALERTS[event["kind"]], event["text"])
        found = split_time(self._events, now=self._clock.now())
        return {
            "cluster/attempt": found.attempts,
            "cluster/nodes": found.nodes,
            "cluster/goodput": found.share,
            "cluster/effective": found.effective_share,
            "cluster/effective_held": found.held_share,
            "cluster/downtime_seconds": found.downtime_seconds,
        } | {
            f"cluster/{part}_seconds": seconds
            for part, seconds in found.seconds_in.items()
            if part != TimePart.training
        }


def last_failure(run_folder: Path) -> str:
    """Returns the text of the run's last failure, or ""."""
    texts = [event["text"] for event in read_events(run_folder) if event["kind"] == "failure"]
    return texts[-1] if texts else ""


def cluster_summary(run_folder: Path) -> tuple[str, list[tuple[str, str, str, str]]] | None:
    """Returns a sentence about all attempts and lost time, and (time, attempt, event, text) for each event."""
    events = read_events(run_folder)
    if not events:
        return None
    shown = [event for event in events if event["kind"] not in ROUTINE]
    rows = [
        (
            datetime.datetime.fromtimestamp(event["time"]).strftime("%Y-%m-%d %H:%M:%S"),
            str(event["attempt"]),
            event["kind"].replace("_", " "),
            event["text"],
        )
        for event in shown[-EVENT_ROWS:]
    ]
    return _sentence(split_time(events), len(shown)), rows


def _sentence(found: TimeSplit, events: int) -> str:
    newest = f" The newest {EVENT_ROWS} of {events} events:" if events > EVENT_ROWS else ""
    return (
        f"{found.attempts} attempts, the newest on {found.nodes} nodes. The run trained for {found.share:.1%} of the "
        f"{duration(found.seconds)} since its start; {duration(found.downtime_seconds)} were starts and failures.{newest}"
    )
