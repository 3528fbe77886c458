"""What the ranks of an attempt do, by their reports, and whether they still get on.

What is asked at every tick is counted as reports come in, so that an answer costs as much as its node has ranks.

How long a run may be without news before it counts as hung: longer than such times were so far in this run, with room for noise.

A rank that no driver of ours watches, under torchrun or alone in its process, sees by itself that it hangs, and who holds it up.
"""

import os
import sys
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable
from pathlib import Path

from cluster.cause import Cause, Kind, RankReport, read_report
from cluster.clocks import HeldUp
from cluster.comm_ring import RankTrace, read_traces
from cluster.incident import (
    describe_incident,
    incident_screen,
    judge_failure,
    judge_hang,
    newest_incident,
    write_incident,
)
from cluster.run_files import progress_path
from cluster.spawn import lives
from cluster.stacks import gather_stacks, own_stacks, unanswered
from conf.disk import explain_disk_error
from conf.errors import EXIT_CRASH, EXIT_USER, RunEnded, UserError, causes
from conf.files import exclusive
from conf.words import say

STEP_PHASE = "step"
"""What ranks do between two steps, by its phase; others are start, checkpoint and validation."""
STEP_FLOOR, OTHER_FLOOR = 7.0, 30.0
"""Seconds without news that are never too long, in steps and in all else, where a disk may be slow."""
HANG_ROOM, FIRST_HANG_ROOM = 2.5, 9.0
"""Times the longest so far, and what is added to that, shared by how often it was seen: one observation says little."""
REMEMBERED = 500
"""Times of a kind; older ones no longer say how long it may take."""
QUIET_STEPS, QUIET_SECONDS = 3.0, 3.0
"""Usual times without news after which a run says that it is quiet, and the least seconds."""


class Patience:
    """What a run is used to. hang_after, start_timeout: most seconds without news in steps, and in all else."""

    def __init__(self, hang_after: float, start_timeout: float):
        self._hang_after, self._start_timeout = hang_after, start_timeout
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._work = 1.0

    def take(self, doing: str, seconds: float) -> None:
        """The ranks got on after so many seconds without news in this phase."""
        self._seconds[doing].append(seconds)

    def take_work(self, sequences: float) -> None:
        """A step has so many sequences from here on; times of steps grow with them."""
        if sequences > self._work:
            growth = sequences / self._work
            self._seconds[STEP_PHASE] = deque((growth * seconds for seconds in self._seconds[STEP_PHASE]), REMEMBERED)
        self._work = sequences

    def forget_steps(self) -> None:
        """Another layout begins, whose steps may take any time."""
        self._seconds[STEP_PHASE].clear()

    def limit(self, doing: str) -> float:
        """Seconds without news in this phase after which the run counts as hung."""
        most, floor = (self._hang_after, STEP_FLOOR) if doing == STEP_PHASE else (self._start_timeout, OTHER_FLOOR)
        times = self._seconds[doing]
        room = HANG_ROOM + FIRST_HANG_ROOM / max(1, len(times))
        return min(most, max(floor, room * max(times, default=most)))

    def quiet_after(self) -> float | None:
        """Seconds without news in steps that are worth a word; None before enough were seen."""
        times = sorted(self._seconds[STEP_PHASE])
        return max(QUIET_SECONDS, QUIET_STEPS * times[len(times) // 2]) if len(times) >= 5 else None


NAMED_RANKS = 8
"""Numbers of ranks in a sentence."""
START_PHASE = "start"


class RankWatch:
    """Follows ranks from their start. names: node of each rank, empty where all share one machine; saved: step of the newest
    checkpoint when they began.
    """

    def __init__(self, ranks: Iterable[int], names: dict[int, str], patience: Patience, now: float, saved: int = 0):
        self.reports = {rank: RankReport(rank) for rank in ranks}
        self.names, self.saved = names, max(saved, 0)
        self.moved = now
        """When a rank last got on."""
        self.step = -1
        """The highest step that a rank was seen to work on."""
        self.first_step: int | None = None
        """The first step that a rank was seen to work on."""
        self._patience, self._told_quiet = patience, False
        self._ended = self._bad = 0
        """Ranks that ended, and that failed."""
        self._phases = Counter({START_PHASE: len(self.reports)})
        """Ranks that run, by what they do."""

    @property
    def ended(self) -> bool:
        return self._ended == len(self.reports)

    @property
    def stepping(self) -> bool:
        """Whether it has finished a step of its own."""
        return self.first_step is not None and self.step > min(self.first_step, self.saved + 1)

    @property
    def doing(self) -> str:
        """What the ranks that run are in: a step where all are, else what the others of them do."""
        others = sorted(phase for phase, count in self._phases.items() if count > 0 and phase != STEP_PHASE)
        return START_PHASE if not self.stepping else others[0] if others else STEP_PHASE

    def take(self, now: float, reports: Collection[RankReport]) -> None:
        """Remember what is known of some ranks. One that had no core on a busy machine is not late."""
        starved = max(
            (report.waited_for_core - self.reports[report.rank].waited_for_core for report in reports), default=0.0
        )
        self.moved = min(now, self.moved + max(0.0, starved))
        for report in reports:
            old = self.reports[report.rank]
            if (report.step, report.phase, report.ended) != (old.step, old.phase, old.ended):
                if now > self.moved:
                    self._patience.take(self.doing, now - self.moved)
                self.moved, self._told_quiet = now, False
            self.reports[report.rank] = report
            self.step = max(self.step, report.step)
            self._ended += report.ended - old.ended
            self._bad += report.bad - old.bad
            self._phases[old.phase] -= not old.ended
            self._phases[report.phase] += not report.ended
            if report.sequences:
                self._patience.take_work(report.sequences)
        if self.first_step is None and self.step >= 0:
            self.first_step = self.step

    def forgive(self, now: float, slept: float) -> None:
        """Whoever watches was held up for so long, and may have missed news."""
        self.moved = min(self.moved + slept, now)

    def is_hung(self, now: float) -> bool:
        """Whether there was no news for longer than this run is used to in what its ranks are doing."""
        return now - self.moved > self._patience.limit(self.doing)

    def tell_quiet(self, now: float) -> str | None:
        """A sentence, once for each silence, where a step takes much longer than usual."""
        after, silent = self._patience.quiet_after(), now - self.moved
        if self._told_quiet or self.doing != STEP_PHASE or after is None or silent < after:
            return None
        self._told_quiet = True
        running = [report for report in self.reports.values() if not report.ended]
        last = min(report.step for report in running)
        behind = [report.rank for report in running if report.step == last]
        more = f" and {len(behind) - NAMED_RANKS} more" if len(behind) > NAMED_RANKS else ""
        who = ", ".join(f"{rank} on {self.names[rank]}" if self.names else f"{rank}" for rank in behind[:NAMED_RANKS])
        ranks = f"rank {who} is" if len(behind) == 1 else f"ranks {who}{more} are"
        left = self._patience.limit(STEP_PHASE) - silent
        return f"no news for {silent:.1f} s, where steps take much less: {ranks} in step {last}; counts as hung in {left:.0f} s"


LOOK_SECONDS = 0.25
"""Between two looks."""
STACKS_WITHIN_SECONDS = 2.0
"""That other ranks of this host get to say where they are."""
SAME_INCIDENT_SECONDS = 60.0
"""A rank that fails so soon after another one told why needs not tell it again."""


class SelfWatch:
    """Use it in `with`, around the work of this process. Says where the rank is when it gets on no more; ends: and ends it, so that what
    started the ranks ends or restarts them all. It does not where the process is somebody else's, as a notebook.
    """

    def __init__(self, logs: Path, rank: int, patience: Patience, ends: bool):
        self._logs, self._rank, self._ends = logs, rank, ends
        self._began = time.time()
        self._watch = RankWatch([rank], {}, patience, time.monotonic())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch of this rank", daemon=True)

    def __enter__(self) -> "SelfWatch":
        progress_path(self._logs, self._rank).unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._ends and error is not None and not isinstance(error, UserError | KeyboardInterrupt):
            self._tell_failure(error)

    def _look(self) -> None:
        held_up, told_at = HeldUp(2 * LOOK_SECONDS, time.monotonic()), None
        while not self._stop.wait(LOOK_SECONDS):
            now = time.monotonic()
            self._watch.forgive(now, held_up.since_last_look(now))
            self._watch.take(now, [read_report(self._rank, None, self._logs, os.getpid())])
            if self._watch.first_step is None:
                continue
            if self._watch.is_hung(now) and told_at != self._watch.moved:
                told_at = self._watch.moved
                self._tell_hang(now - told_at)
            elif text := self._watch.tell_quiet(now):
                say(text, file=sys.stderr)

    def _tell_hang(self, seconds: float) -> None:
        traces = read_traces(self._logs)
        reports = self._reports(traces)
        stacks = self._stacks(traces, native=True) | {self._rank: own_stacks() + unanswered(os.getpid())}
        cause, finding = judge_hang(reports, traces, stacks, {}, seconds)
        self._tell(cause, describe_incident(cause, finding, traces, stacks, seconds), stacks[self._rank])
        if self._ends:
            sys.stderr.flush()
            os._exit(EXIT_CRASH)

    def _tell_failure(self, error: BaseException) -> None:
        """An error of this rank, which may come from what another one did."""
        traces = read_traces(self._logs)
        stacks = self._stacks(traces)
        code = error.code if isinstance(error, RunEnded) else EXIT_CRASH
        kind = Kind.diverged if code not in (EXIT_CRASH, EXIT_USER) else Kind.crash
        ranks = tuple(getattr(error, "ranks", ())) or (self._rank,)
        first = list(causes(error))[-1]  # the pipeline wraps what fails in it in a page of its own
        words = next((line for line in str(first).splitlines() if line.strip()), "")
        cause = Cause(kind, f"rank {self._rank} failed: {type(first).__name__}: {words}", ranks, code=code)
        if gone := [rank for rank, trace in traces.items() if trace.is_here and not lives(trace.pid)]:
            text = f"{', '.join(f'rank {rank}' for rank in gone)} ended in the middle of the work"
            cause = Cause(Kind.killed, f"{text}, which rank {self._rank} failed of", tuple(gone))
        cause, finding = judge_failure(cause, traces, stacks, {})
        self._tell(cause, describe_incident(cause, finding, traces, stacks), "")

    def _tell(self, cause: Cause, incident: dict, stack: str) -> None:
        """One rank of a run tells the incident, the first; the others that they end with it."""
        path = None
        try:
            with exclusive(self._logs / ".incident.lock", STACKS_WITHIN_SECONDS):
                told = newest_incident(self._logs)
                if told is not None and told[1]["time"] > max(self._began, time.time() - SAME_INCIDENT_SECONDS):
                    say(f"rank {self._rank} ends with an incident that another rank told: {told[0]}", file=sys.stderr)
                    return
                path = write_incident(self._logs, incident)
        except (OSError, TimeoutError) as error:
            why = explain_disk_error(error) if isinstance(error, OSError) else str(error)
            say(f"the incident could not be written ({why})", file=sys.stderr)
        say(f"{stack}error: {cause.text}\n{incident_screen(incident, path, told=True)}", file=sys.stderr)

    def _reports(self, traces: dict[int, RankTrace]) -> list[RankReport]:
        """All ranks that left a ring, as far as this one sees them."""
        here = {rank: trace.pid for rank, trace in traces.items() if trace.is_here}
        return [read_report(rank, None, self._logs, here.get(rank)) for rank in sorted({*traces, self._rank})]

    def _stacks(self, traces: dict[int, RankTrace], native: bool = False) -> dict[int, str]:
        """Where the other ranks of this host are."""
        others = {rank: trace.pid for rank, trace in traces.items() if trace.is_here and rank != self._rank}
        return gather_stacks(self._logs, others, STACKS_WITHIN_SECONDS, native)
