"""What the ranks of an attempt do, by their reports, and whether they still get on.

What is asked at every tick is counted as reports come in, so that an answer costs as much as its node has ranks.
"""

from collections import Counter
from collections.abc import Collection, Iterable

from cluster.cause import RankReport
from cluster.patience import QUIET_SECONDS, QUIET_STEPS, START_PHASE, STEP_PHASE, STEP_PHASES, Patience

NAMED_RANKS = 8
"""Numbers of ranks in a sentence."""


class RankWatch:
    """Follows ranks from their start. names: node of each rank, empty where all share one machine; saved: step of the newest
    checkpoint when they began.
    """

    def __init__(self, ranks: Iterable[int], names: dict[int, str], patience: Patience, now: float, saved: int = 0):
        self.reports = {rank: RankReport(rank) for rank in ranks}
        self.names, self.saved = names, max(saved, 0)
        self.moved = now
        """When there was news last: a rank came to another step or phase."""
        self.alive = now
        """When a rank last did a piece of its work."""
        self.step = -1
        """The highest step that a rank was seen to work on."""
        self.first_step: int | None = None
        """The first step that a rank was seen to work on."""
        self._patience, self._told_quiet = patience, False
        self._step_began = now
        """When a rank first came to the highest step, or the ranks back to it."""
        self._silences = 0
        """Counts what ended a silence."""
        self._late: tuple[int, float] | None = None
        """The silence that was named, and since when it was."""
        self._ended = self._bad = 0
        """Ranks that ended, and that failed."""
        self._phases = Counter({START_PHASE: len(self.reports)})
        """Ranks that run, by what they do."""
        self._elsewhere = set[str]()
        """What ranks do that are not of this watch."""

    @property
    def ended(self) -> bool:
        return self._ended == len(self.reports)

    @property
    def stepping(self) -> bool:
        """Whether it has finished a step of its own."""
        return self.first_step is not None and self.step > min(self.first_step, self.saved + 1)

    @property
    def doing(self) -> str:
        """What the ranks that run, and others that are known of, are in: a step where all are, else what the others of them do."""
        phases = {phase for phase, count in self._phases.items() if count > 0} | self._elsewhere
        others = sorted(phases - {STEP_PHASE})
        return START_PHASE if not self.stepping else others[0] if others else STEP_PHASE

    def take(self, now: float, reports: Collection[RankReport]) -> None:
        """Remember what is known of some ranks. One that had no core on a busy machine is not late."""
        starved = max(
            (report.waited_for_core - self.reports[report.rank].waited_for_core for report in reports), default=0.0
        )
        self.forgive(now, max(0.0, starved))
        doing, step = self.doing, self.step
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
        if self.first_step is None and self.step >= 0:
            self.first_step = self.step
        if self.moved == now:
            self._elsewhere = set()
        self._learn(now, doing, step)

    def see_others(self, now: float, phases: set[str], moved: bool) -> None:
        """What ranks do that are not of this watch, while its own are silent, and whether they did anything since it looked last."""
        self._elsewhere = phases
        if moved:
            self.alive = now

    def _learn(self, now: float, did: str, step: int) -> None:
        """Say how long a step took, and what is done. did, step: before these reports."""
        left, comes = did in STEP_PHASES, self.doing in STEP_PHASES
        if left and (self.step > step or not comes):
            self._patience.take(STEP_PHASE, now - self._step_began)
        if comes and (self.step > step or not left):
            self._step_began = now
        if did != START_PHASE and (self.doing != did or self.step > step):
            self._patience.finish(STEP_PHASE if left else did)

    def forgive(self, now: float, slept: float) -> None:
        """The watching process or a rank was held up for so many seconds, and may have missed news."""
        self.moved, self.alive = min(self.moved + slept, now), min(self.alive + slept, now)

    @property
    def silent_since(self) -> float:
        """When there was news last: in steps of another step or phase, else of any piece of work."""
        return self.moved if self.doing in STEP_PHASES else self.alive

    def is_late(self, now: float) -> bool:
        """Whether there was no news for longer than this run is used to in what its ranks are doing, and nobody was named for it so far."""
        return self._late is None and now - self.silent_since > self._patience.limit(self.doing)

    def name_late(self) -> None:
        """Notes that the rank which holds the run up is named, once for each silence."""
        self._late = self._silences, self.silent_since

    def over(self, now: float) -> float | None:
        """How long the silence is, in seconds, that was named and is not over, where the ranks end well."""
        return now - self._late[1] if self._late is not None else None

    def went_on(self) -> float | None:
        """How long the silence was that was named, in seconds; once, when it is over."""
        if self._late is None or self._late[0] == self._silences:
            return None
        seconds, self._late = self.silent_since - self._late[1], None
        return seconds

    def is_hung(self, now: float) -> bool:
        """Whether no rank did anything for so long that the run is to be ended."""
        return self.seconds_left(now) < 0

    def seconds_left(self, now: float) -> float:
        """Until the run is ended, if no rank does anything."""
        return self.alive + self._patience.kill_limit(self.doing) - now

    def tell_quiet(self, now: float) -> str | None:
        """A sentence, once for each silence, where a step takes much longer than usual."""
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
        return f"no news for {silent:.1f} s, where a step takes {usual:.1f} s: {ranks} in step {last}; ended in {left:.0f} s without progress"
