"""Writes the history of a run, runs/NAME/events.jsonl, and collects the output of the ranks.

A line of events.jsonl is one JSON object. Later launches append to the file.

    time      Unix time in seconds, from a clock that nobody can set while the driver runs
    kind      kind of the event; see EVENT_KINDS
    attempt   attempt of the event; 0 before the first attempt
    text      one sentence for people
    ...       further fields of the kind; see EVENT_KINDS
"""

import contextlib
import errno
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.clocks import SteadyClock
from cluster.driver.messages import DriverPhase
from cluster.run_files import LATEST, log_path
from conf.disk import Backlog, explain_disk_error, naming
from conf.files import atomic_write_text, open_plain, read_plain, read_tail
from conf.words import say

if TYPE_CHECKING:
    from cluster.driver.supervisor import Supervisor


EVENTS_FILE = "events.jsonl"

EVENT_KINDS = {
    "launch": "the driver started. world: ranks wanted",
    "node_joined": "a node is available and passed the checks. node: its name",
    "node_refused": "a node is available and failed a check. node",
    "call_failed": "an agent failed in a request other than a start; the attempt continues. node, method",
    "node_lost": "a node does not answer, or is known to be dead. node",
    "node_back": "a lost node answers again, or its agent was restarted. node",
    "network": "result of the network test. pairs, median_gbit, slow: [[from, to, gbit, ms], ...]",
    "no_pulse": "nodes of a large cluster that the driver must check through Ray. nodes: names",
    "priority": "nodes whose agents and ranks have a low process priority. nodes: names",
    "attempt": "the ranks are started. pp, dp, ep, nodes: names, spares: names",
    "idle": "a smaller layout leaves nodes without ranks; the reason. nodes: names",
    "limits": "the layout cannot lose any node",
    "first_step": "the attempt has finished its first step. step, seconds: since the order to start",
    "quiet": "steps take much longer than usual; the ranks that are behind; once for each silence",
    "late": "no progress for longer than usual; the blocking ranks, before the attempt is ended. ranks, nodes",
    "went_on": "the run was late and makes progress again. seconds: without progress",
    "straggler": "a rank is slower than the others. rank, node, seconds and median per step",
    "clock": "the clock of a node jumped. node",
    "disk": "a node has little space left for temporary files. node",
    "checkpoint": "a checkpoint is complete. step",
    "failure": "an attempt failed. cause: user, node, killed, crash, hang, diverged, start; ranks and nodes: the first that "
    "failed; log: output or stacks of the failure; seconds: since the last progress",
    "waiting": "the next attempt cannot start at once",
    "incident": "the ranks that broke or blocked the attempt, from the records of all ranks. ranks; fault: see cluster/compare_ranks.py",
    "recovered": "the first step after a failure. seconds: from the failure, or from the last step before a hang; "
    "steps_again: repeated steps",
    "caught_up": "the repeated steps are complete. step",
    "grow": "the run stops and restarts with nodes that came back",
    "drain": "a node will be shut down. node, stops: whether the run stops and restarts without it",
    "stop": "a request to stop",
    "finish": "the run ended. code: exit code",
}


class Journal:
    """Appends to events.jsonl and logs/rank_N.log. If the disk refuses data, events wait in memory and output is lost.

    note: called with a sentence at the first such error.
    """

    def __init__(self, folder: Path, note: Callable[[str], None] = say):
        self._path, self._note, self._refused = folder / EVENTS_FILE, note, False
        self._clock = SteadyClock()
        self._events = Backlog(partial(self._append, self._path))
        self._logs = folder / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        if read_tail(self._path, 1) not in (b"", b"\n"):
            # Ends an incomplete line of an earlier launch that crashed.
            self._try(self._append, self._path, b"\n")

    def write(self, kind: str, attempt: int, text: str, **fields: Any) -> None:
        """Append one event."""
        assert kind in EVENT_KINDS, f"event {kind!r} is missing from cluster/driver/journal.py"
        line = json.dumps(
            {"time": round(self._clock.now(), 3), "kind": kind, "attempt": attempt, "text": text, **fields}
        )
        self._try(self._events.add, line.encode() + b"\n")

    def output(self, rank: int, piece: bytes) -> None:
        """Append to the log of a rank."""
        self._try(self._append, log_path(self._logs, rank), piece)

    def _append(self, path: Path, piece: bytes) -> None:
        """Append either all bytes or none."""
        with naming(path, len(piece)), open(path, "ab", buffering=0, opener=open_plain) as file:
            size = file.tell()
            if (written := file.write(piece)) != len(piece):
                file.truncate(size)
                raise OSError(errno.ENOSPC, f"{written} of {len(piece)} bytes written")

    def _try(self, append: Callable[..., None], *what: Any) -> None:
        try:
            append(*what)
        except OSError as error:
            if not self._refused:
                self._refused = True
                self._note(
                    f"events or output of ranks could not be written ({explain_disk_error(error)}); the run continues"
                )


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return all events in order; empty without a file. Lines that are not events are skipped."""
    path = folder / EVENTS_FILE
    events = []
    for line in read_plain(path).splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            if _is_event(event := json.loads(line)):
                events.append(event)
    return events


def _is_event(found: Any) -> bool:
    match found:
        case {"time": int() | float() as time, "kind": str(), "attempt": int(attempt), "text": str()}:
            return 0 <= attempt < 10**15 and 0 <= time < LATEST
    return False


# ranks.json of a run folder: the state of all ranks in the newest attempt, for external tools.
#
# time      Unix time at which the driver wrote the file
# attempt   number of the attempt
# phase     phase of the driver (cluster/driver/messages.py)
# pp, dp    layout of the attempt; with parallel.cp, dp counts all ranks of a stage
# ranks     [[rank, node, step, phase, busy, seconds, memory, ended], ...], as in cluster.cause.RankReport

RANKS_FILE = "ranks.json"
WRITTEN_EVERY, SLOWER_FROM = 2.0, 1000
"""Seconds between writes of ranks.json; above SLOWER_FROM ranks, proportional to their number."""


class RankTable:
    """Writes ranks.json at intervals, if the disk accepts it."""

    def __init__(self, folder: Path):
        self._path, self._clock = folder / RANKS_FILE, SteadyClock()
        self._due, self._phase = 0.0, DriverPhase.gathering

    def update(self, supervisor: "Supervisor", now: float) -> None:
        """Write the file after the interval or at a new phase. now: monotonic seconds."""
        attempt = supervisor.attempt
        if attempt is None or (now < self._due and supervisor.phase is self._phase):
            return
        self._due = now + WRITTEN_EVERY * max(1.0, len(attempt.reports) / SLOWER_FROM)
        self._phase = supervisor.phase
        ranks = [
            [
                each.rank,
                attempt.names[each.rank],
                each.step,
                each.phase,
                each.busy,
                each.seconds,
                each.memory,
                each.ended,
            ]
            for each in attempt.reports.values()
        ]
        layout = {"pp": attempt.placement.pp, "dp": attempt.placement.dp}
        head = {"time": self._clock.now(), "attempt": attempt.number, "phase": self._phase.value}
        with contextlib.suppress(OSError):
            atomic_write_text(self._path, json.dumps(head | layout | {"ranks": ranks}), durable=False)
