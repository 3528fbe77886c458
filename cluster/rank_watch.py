"""What the ranks of an attempt do, by their reports, and whether they still get on.

What is asked at every tick is counted as reports come in, so that an answer costs as much as its node has ranks.
"""

from collections import Counter
from collections.abc import Collection, Iterable

from cluster.cause import RankReport
from cluster.patience import STEP_PHASE, Patience

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
