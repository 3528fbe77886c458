"""Time limits of a silent run: after which silence a run is late, and after how long without progress it is ended.

Both limits grow with what the run has shown: a run is late if it has no news for longer than its earlier silences, with
a margin for noise. A late run only gets a warning. A run is ended only when no rank has done any piece of work
(cluster/comm_ring.py) for `cluster.kill_after`.

Observations of a phase count only after the first phase of its kind is complete. Until then, and until the first step
of an attempt is complete, only the ceilings count: `cluster.hang_after` in steps, `cluster.start_timeout` elsewhere.
"""

from collections import defaultdict, deque

from conf.schema import Cluster

START_PHASE, STEP_PHASE = "start", "step"
STEP_PHASES = (STEP_PHASE, "on_step")
"""Phases that belong to steps: the work between two steps, and the callback hook of a step."""
PATIENT_PHASES = ("checkpoint", "on_start", "on_step", "on_save", "on_checkpoint", "on_end")
"""Phases in which a disk, a network or user code works in silence: saves, uploads and callbacks."""
STEP_FLOOR, OTHER_FLOOR = 7.0, 30.0
"""Seconds without news that are never late, in steps and elsewhere; elsewhere a disk may be slow."""
KILL_ON_CPU, KILL_ON_GPU = 60.0, 120.0
"""Defaults of `cluster.kill_after`, in seconds."""
HANG_ROOM, FIRST_HANG_ROOM = 2.5, 9.0
"""Factor on the longest observation, and an addition that is divided by the number of observations.
The addition is large at first, because a single observation says little.
"""
REMEMBERED = 500
"""Number of observations kept per kind; older ones no longer show how long it may take."""
QUIET_STEPS, QUIET_SECONDS = 3.0, 3.0
"""A run reports that it is quiet after this many usual steps without news, and after at least these seconds."""


def patience_of(cluster: Cluster) -> "Patience":
    """Return the patience of a run with these settings."""
    return Patience(cluster.hang_after, cluster.start_timeout, cluster.kill_after, cluster.timeout)


class Patience:
    """Observed times of a run, in seconds, and the limits derived from them.

    hang_after, start_timeout: ceilings, in steps and elsewhere. kill_after: minimum time without progress before the
    run is ended; None for the defaults. timeout: the same minimum in saves, uploads and callbacks.
    """

    def __init__(
        self, hang_after: float, start_timeout: float, kill_after: float | None = None, timeout: float = 600.0
    ):
        self._hang_after, self._start_timeout = hang_after, start_timeout
        self._kill_after, self._timeout = kill_after, timeout
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._done = set[str]()
        """Phases that were completed at least once."""
        self._work = 1.0
        self.on_gpu = False
        """Whether ranks compute on GPUs."""

    def take(self, doing: str, seconds: float) -> None:
        """Record the seconds of a step, or the seconds without news before progress in another phase."""
        self._seconds[doing].append(seconds)

    def finish(self, doing: str) -> None:
        """Record that a phase of this kind is complete; its observations count from now on."""
        self._done.add(doing)

    def take_work(self, sequences: float) -> None:
        """Set the number of sequences of a step from now on; known step times grow in proportion."""
        if sequences > self._work:
            growth = sequences / self._work
            self._seconds[STEP_PHASE] = deque((growth * seconds for seconds in self._seconds[STEP_PHASE]), REMEMBERED)
        self._work = sequences

    def forget_steps(self) -> None:
        """Forget step times: another layout begins, whose steps may take any time."""
        self._seconds[STEP_PHASE].clear()

    def limit(self, doing: str) -> float:
        """Return the seconds without news in this phase after which the run is late."""
        ceiling, floor = self._ceiling(doing), STEP_FLOOR if doing in STEP_PHASES else OTHER_FLOOR
        kind = STEP_PHASE if doing in STEP_PHASES else doing
        times = self._seconds[kind] if kind in self._done and doing != START_PHASE else ()
        room = HANG_ROOM + FIRST_HANG_ROOM / max(1, len(times))
        return min(ceiling, max(floor, room * max(times, default=ceiling)))

    def kill_limit(self, doing: str) -> float:
        """Return the seconds without any progress in this phase after which the run is ended."""
        floor = self._kill_after or (KILL_ON_GPU if self.on_gpu else KILL_ON_CPU)
        if doing in PATIENT_PHASES:
            floor = max(floor, self._timeout)
        return min(self._ceiling(doing), max(floor, self.limit(doing)))

    def _ceiling(self, doing: str) -> float:
        return self._hang_after if doing in STEP_PHASES else self._start_timeout

    def usual_step(self) -> float | None:
        """Return the median step time in seconds; None before 5 observations."""
        times = sorted(self._seconds[STEP_PHASE])
        return times[len(times) // 2] if len(times) >= 5 else None
