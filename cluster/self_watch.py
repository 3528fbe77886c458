"""Detects a hang from inside a rank, and names the blocking rank."""

import os
import sys
import threading
import time
from pathlib import Path

from cluster.cause import Cause, Kind, RankReport, read_report
from cluster.clocks import HeldUp
from cluster.comm_ring import RankTrace, living_ranks, read_traces
from cluster.incident import (
    describe_incident,
    incident_screen,
    judge_failure,
    judge_hang,
    newest_incident,
    tell_went_on,
    warning_of,
    write_incident,
)
from cluster.patience import Patience
from cluster.place import Place
from cluster.rank_watch import RankWatch
from cluster.run_files import progress_path
from cluster.spawn import lives
from cluster.stacks import gather_stacks, own_stacks, unanswered
from conf.disk import explain_disk_error
from conf.errors import EXIT_CRASH, EXIT_USER, RunEnded, StopInterrupt, UserError, causes
from conf.files import exclusive
from conf.words import say

LOOK_SECONDS = 0.25
"""Seconds between two checks of this rank's progress."""
OTHERS_AFTER_SECONDS, RANKS_IN_A_SECOND = 2.0, 50.0
"""Seconds of silence before a rank checks the other ranks, and maximum number of ranks checked per second."""
STACKS_WITHIN_SECONDS = 2.0
"""Seconds to wait for the stacks of this host's other ranks."""
SAME_INCIDENT_SECONDS = 60.0
"""If another rank reported an incident within this number of seconds, a failing rank does not report one again."""


class SelfWatch:
    """Watches the progress of this process and reports a hang. Use in `with`.

    ends: whether to end a hung process. Pass False for a process of the user, such as a notebook.
    """

    def __init__(self, logs: Path, place: Place, patience: Patience, ends: bool):
        self._logs, self._rank, self._world, self._ends = logs, place.rank, place.world, ends
        self._began = time.time()
        self._watch = RankWatch([place.rank], {}, patience, time.monotonic())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch of this rank", daemon=True)

    def __enter__(self) -> "SelfWatch":
        progress_path(self._logs, self._rank).unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._stop.set()
        self._thread.join()
        if error is None and (seconds := self._watch.over(time.monotonic())) is not None:
            tell_went_on(self._logs, seconds)
        if self._ends and error is not None and not isinstance(error, UserError | StopInterrupt):
            self._tell_failure(error)

    def _look(self) -> None:
        held_up, look_at, seen = HeldUp(2 * LOOK_SECONDS, time.monotonic()), 0.0, list[tuple]()
        while not self._stop.wait(LOOK_SECONDS):
            now = time.monotonic()
            self._watch.forgive(now, held_up.since_last_look(now))
            self._watch.take(now, [read_report(self._rank, None, self._logs, os.getpid())])
            if self._watch.first_step is None:
                continue
            if now - self._watch.silent_since > OTHERS_AFTER_SECONDS and now > look_at:
                before, seen = seen, self._look_at_others()
                self._watch.see_others(now, {phase for phase, *_ in seen}, seen != before)
                look_at = time.monotonic() + OTHERS_AFTER_SECONDS + self._world / RANKS_IN_A_SECOND
            if self._ends and self._watch.is_hung(now):
                self._tell_hang(now - self._watch.silent_since, None)
                sys.stderr.flush()
                os._exit(EXIT_CRASH)
            elif self._watch.is_late(now):
                self._watch.name_late()
                self._tell_hang(now - self._watch.silent_since, self._watch.seconds_left(now))
                # The time for collecting stacks does not count against the rank.
                held_up.since_last_look(time.monotonic())
            elif (seconds := self._watch.went_on()) is not None:
                tell_went_on(self._logs, seconds)
            elif text := self._watch.tell_quiet(now):
                say(text, file=sys.stderr)

    def _look_at_others(self) -> list[tuple]:
        """Return the progress of all other ranks, if readable. If one of them makes progress, the run does not hang."""
        reports = [read_report(rank, None, self._logs) for rank in range(self._world) if rank != self._rank]
        return [(one.phase, one.rank, one.step, one.done, one.written) for one in reports if one.step >= 0]

    def _tell_hang(self, seconds: float, left: float | None) -> None:
        """Name the rank that blocks this rank. left: seconds until this rank is ended; None if now."""
        traces = read_traces(self._logs)
        reports = self._reports(traces)
        stacks = self._stacks(traces, native=left is None)
        stacks[self._rank] = own_stacks() + unanswered(os.getpid())
        cause, finding = judge_hang(reports, traces, stacks, {}, seconds)
        incident = describe_incident(cause, finding, traces, stacks, seconds, live=left is not None)
        if left is None:
            self._tell(f"{stacks[self._rank]}error: {cause.text}", incident)
        else:
            text = warning_of(cause.text, left) if self._ends else cause.text
            self._tell(f"warning: {text}", incident | {"late": True})

    def _tell_failure(self, error: BaseException) -> None:
        """Report this rank's error, or another rank that caused it."""
        traces = read_traces(self._logs)
        stacks = self._stacks(traces)
        code = error.code if isinstance(error, RunEnded) else EXIT_CRASH
        kind = Kind.diverged if code not in (EXIT_CRASH, EXIT_USER) else Kind.crash
        ranks = tuple(getattr(error, "ranks", ())) or (self._rank,)
        # The pipeline wraps its errors in an error with another message.
        first = list(causes(error))[-1]
        words = next((line for line in str(first).splitlines() if line.strip()), "")
        cause = Cause(kind, f"rank {self._rank} failed: {type(first).__name__}: {words}", ranks, code=code)
        if gone := [rank for rank, trace in traces.items() if trace.is_here and not lives(trace.pid)]:
            text = f"{', '.join(f'rank {rank}' for rank in gone)} ended before the end of the work"
            cause = Cause(Kind.killed, f"{text}, which made rank {self._rank} fail", tuple(gone))
        cause, finding = judge_failure(cause, traces, stacks, {})
        self._tell(f"error: {cause.text}", describe_incident(cause, finding, traces, stacks))

    def _tell(self, text: str, incident: dict) -> None:
        """Report the incident. After another rank's report, print only that this rank ends."""
        path, late = None, incident.get("late", False)
        try:
            with exclusive(self._logs / ".incident.lock", STACKS_WITHIN_SECONDS):
                incident_found = newest_incident(self._logs)
                same = incident_found is not None and incident_found[1].get("late", False) == late
                if same and incident_found[1]["time"] > max(self._began, time.time() - SAME_INCIDENT_SECONDS):
                    if not late:
                        text = f"rank {self._rank} ends because of an incident that another rank reported: {incident_found[0]}"
                        say(text, file=sys.stderr)
                    return
                path = write_incident(self._logs, incident)
        except OSError as error:  # includes TimeoutError
            say(f"the incident could not be written ({explain_disk_error(error)})", file=sys.stderr)
        say(f"{text}\n{incident_screen(incident, path, reported=True)}", file=sys.stderr)

    def _reports(self, traces: dict[int, RankTrace]) -> list[RankReport]:
        """Return reports of all ranks whose rings this rank can read."""
        here = {rank: trace.pid for rank, trace in traces.items() if trace.is_here}
        return [read_report(rank, None, self._logs, here.get(rank)) for rank in sorted({*traces, self._rank})]

    def _stacks(self, traces: dict[int, RankTrace], native: bool = False) -> dict[int, str]:
        """Return the stacks of the other ranks on this host."""
        others = {rank: pid for rank, pid in living_ranks(self._logs, traces).items() if rank != self._rank}
        return gather_stacks(self._logs, others, STACKS_WITHIN_SECONDS, native)
