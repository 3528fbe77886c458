"""Follows the ranks of an attempt by their reports, and decides whether they make progress.

Its values change only when reports arrive, so that a tick of the driver costs little.
"""

from collections import Counter
from collections.abc import Collection, Iterable

from cluster.cause import RankReport
from cluster.patience import QUIET_SECONDS, QUIET_STEPS, START_PHASE, STEP_PHASE, STEP_PHASES, Patience

NAMED_RANKS = 8
"""Maximum number of ranks that a sentence names."""


class RankWatch:
    """Watches ranks from their start.

    names: node of each rank; empty for one machine. saved: step of the newest checkpoint; -1 if unknown.
    """

    def __init__(self, ranks: Iterable[int], names: dict[int, str], patience: Patience, now: float, saved: int = -1):
        self.reports = {rank: RankReport(rank) for rank in ranks}
        self.names, self.saved = names, saved
        self.moved = now
        """Time at which a rank last entered another step or phase, or ended."""
        self.alive = now
        """Time at which a rank last completed a unit of work."""
        self.step = -1
        """Highest step that any rank has reported."""
        self.first_step: int | None = None
        """First step that any rank reported; None before the first report."""
        self._patience, self._told_quiet = patience, False
        self._step_began = now
        """Time at which the current step began: a rank reached it for the first time, or the ranks returned to it from
        another phase."""
        self._silences = 0
        """Number of reports that showed progress; each of them ended a silence."""
        self._late: tuple[int, float] | None = None
        """At the last warning: value of `_silences`, and time at which the silence began. None without a warning."""
        self._ended = self._bad = 0
        """Number of ranks that have ended, and number of ranks that have failed."""
        self._phases = Counter({START_PHASE: len(self.reports)})
        """Number of running ranks, by phase."""
        self._elsewhere = set[str]()
        """Phases of the ranks that this watch does not follow."""

    @property
    def ended(self) -> bool:
        return self._ended == len(self.reports)

    @property
    def begin(self) -> int:
        """First step of the attempt, known after the first report of a step."""
        assert self.first_step is not None
        return self.first_step if self.saved < 0 else min(self.first_step, self.saved + 1)

    @property
    def stepping(self) -> bool:
        """Whether the attempt has completed a step."""
        return self.first_step is not None and self.step > self.begin

    @property
    def doing(self) -> str:
        """Return the phase of the running ranks:

            start          before the attempt's first complete step
            step           if all ranks are in steps
            other phase    otherwise: the phase of at least one rank

        Known phases of ranks that this watch does not follow count too.
        """
        phases = {phase for phase, count in self._phases.items() if count > 0} | self._elsewhere
        others = sorted(phases - {STEP_PHASE})
        return START_PHASE if not self.stepping else others[0] if others else STEP_PHASE

    def take(self, now: float, reports: Collection[RankReport]) -> None:
        """Process reports of ranks. Time in which a rank waits for a CPU core does not count as silence."""
        starved = max(
            (report.waited_for_core - self.reports[report.rank].waited_for_core for report in reports), default=0.0
        )
        self.forgive(now, max(0.0, starved))
        doing, step, starting = self.doing, self.step, self._phases["on_start"] > 0
        for report in reports:
            old = self.reports[report.rank]
            if (report.step, report.phase, report.ended) != (old.step, old.phase, old.ended):
                if now > self.moved and self.doing not in (START_PHASE, *STEP_PHASES):
                    self._patience.take(self.doing, now - self.moved)
                self.moved = self.alive = now
                self._silences += 1
                self._told_quiet = False
            elif report.done != old.done or (report.written != old.written and doing not in STEP_PHASES):
                self.alive = now
                self._silences += doing not in STEP_PHASES
            self.reports[report.rank] = report
            self.step = max(self.step, report.step)
            self._ended += report.ended - old.ended
            self._bad += report.bad - old.bad
            self._phases[old.phase] -= not old.ended
            self._phases[report.phase] += not report.ended
            self._patience.on_gpu |= report.on_gpu
            if report.sequences:
                self._patience.take_work(report.sequences)
        # In on_start, ranks report the step before the attempt's first step.
        if starting or (self.first_step is None and self.step >= 0):
            self.first_step = self.step
        if self.moved == now:
            self._elsewhere = set()
        self._learn(now, doing, step)

    def see_others(self, now: float, phases: set[str], moved: bool) -> None:
        """Record the phases of ranks that this watch does not follow, while its own ranks are silent.

        moved: whether the other ranks made progress since the previous call.
        """
        self._elsewhere = phases
        if moved:
            self.alive = now

    def _learn(self, now: float, did: str, step: int) -> None:
        """Record how long the last step took, and which phases are complete. did, step: previous phase and step."""
        left, comes = did in STEP_PHASES, self.doing in STEP_PHASES
        if left and (self.step > step or not comes):
            self._patience.take(STEP_PHASE, now - self._step_began)
        if comes and (self.step > step or not left):
            self._step_began = now
        if did != START_PHASE and (self.doing != did or self.step > step):
            self._patience.finish(STEP_PHASE if left else did)

    def forgive(self, now: float, slept: float) -> None:
        """Extend the limits by `slept`, the seconds in which a rank or this process could not run."""
        self.moved, self.alive = min(self.moved + slept, now), min(self.alive + slept, now)

    @property
    def silent_since(self) -> float:
        """Return the time of the last progress. During steps, a rank makes progress when it enters another step or
        phase. In other phases, a rank makes progress when it completes a unit of work."""
        return self.moved if self.doing in STEP_PHASES else self.alive

    def is_late(self, now: float) -> bool:
        """Whether the silence is unusually long and has no warning yet."""
        return self._late is None and now - self.silent_since > self._patience.limit(self.doing)

    def name_late(self) -> None:
        """Record that the user was warned about this silence."""
        self._late = self._silences, self.silent_since

    def over(self, now: float) -> float | None:
        """Return the seconds of the current silence if the user was warned about it, else None. Call it when all ranks
        have ended."""
        return now - self._late[1] if self._late is not None else None

    def went_on(self) -> float | None:
        """Return the seconds of an ended silence about which the user was warned, once per silence; else None."""
        if self._late is None or self._late[0] == self._silences:
            return None
        seconds, self._late = self.silent_since - self._late[1], None
        return seconds

    def is_hung(self, now: float) -> bool:
        """Whether no rank made progress for longer than the limit."""
        return self.seconds_left(now) < 0

    def seconds_left(self, now: float) -> float:
        """Return the seconds until the run is ended if no rank makes progress."""
        return self.alive + self._patience.kill_limit(self.doing) - now

    def tell_quiet(self, now: float) -> str | None:
        """Return a sentence, once per silence, if the current step takes unusually long."""
        usual, silent = self._patience.usual_step(), now - self.moved
        if self._told_quiet or self.doing != STEP_PHASE or usual is None:
            return None
        if silent < max(QUIET_SECONDS, QUIET_STEPS * usual):
            return None
        self._told_quiet = True
        running = [report for report in self.reports.values() if not report.ended]
        last = min(report.step for report in running)
        behind = [report.rank for report in running if report.step == last]
        more = f" and {len(behind) - NAMED_RANKS} more" if len(behind) > NAMED_RANKS else ""
        who = ", ".join(f"{rank} on {self.names[rank]}" if self.names else f"{rank}" for rank in behind[:NAMED_RANKS])
        ranks = f"rank {who} is" if len(behind) == 1 else f"ranks {who}{more} are"
        left = self.seconds_left(now)
        return f"no progress for {silent:.1f} s, and a step takes {usual:.1f} s: {ranks} in step {last}; the run is ended in {left:.0f} s without progress"
