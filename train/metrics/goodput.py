"""How a run on a cluster used its time, from the events that its driver writes (cluster/driver/journal.py)."""

import datetime
from collections.abc import Callable
from pathlib import Path

from cluster.clocks import SteadyClock
from cluster.driver.journal import EVENTS_FILE, read_events
from cluster.driver.time_split import TimePart, TimeSplit, split_time
from train.metrics.names import Record
from train.metrics.quantities import duration

EVENT_ROWS = 200
"""Events in the report, the newest ones."""
ROUTINE = {"checkpoint"}
"""Kinds that the report leaves out."""


ALERTS = {"straggler": "a rank is slow", "node_lost": "a node is lost"}
"""Kinds that somebody is told of while the run goes on, and in which words."""


class GoodputRecord:
    """The figures for every step of a run; the events are read again when there are new ones.

    tell: called with a few words and a sentence for each new event of ALERTS.
    """

    def __init__(self, run_folder: Path, tell: Callable[[str, str], None] = lambda *_: None):
        self._folder, self._size, self._tell = run_folder, -1, tell
        self._events, self._clock = read_events(run_folder), SteadyClock()

    def __call__(self) -> Record:
        path = self._folder / EVENTS_FILE
        size = path.stat().st_size if path.exists() else -1  # a full disk may have refused the events
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
    """What ended the attempt before this one; empty where that is not known."""
    texts = [event["text"] for event in read_events(run_folder) if event["kind"] == "failure"]
    return texts[-1] if texts else ""


def cluster_summary(run_folder: Path) -> tuple[str, list[tuple[str, str, str, str]]] | None:
    """A sentence, and rows (time, attempt, event, text) for the report; None for a run without such events."""
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
        f"{duration(found.seconds)} that it was up; {duration(found.downtime_seconds)} went into starts and failures.{newest}"
    )
