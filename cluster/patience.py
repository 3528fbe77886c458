"""Time limits of a silent run: after one limit the run is late, after another it is ended.

A run is late if its silence is longer than its earlier silences plus a margin. A run is ended if no rank has completed
a unit of work (cluster/comm_ring.py) for `cluster.kill_after`.

Until the run has completed a first phase of a kind, other limits apply: `cluster.hang_after` during steps, and
`cluster.start_timeout` in other phases and before an attempt's first complete step.
"""

from collections import defaultdict, deque

from conf.schema import Cluster

START_PHASE, STEP_PHASE = "start", "step"
STEP_HOOKS = ("on_batch", "on_update", "on_skip", "on_step")
"""Hooks of callbacks that are called in steps."""
STEP_PHASES = (STEP_PHASE, *STEP_HOOKS)
"""Phases of a step: the step itself and the callbacks' hooks."""
PATIENT_PHASES = ("checkpoint", "on_start", *STEP_HOOKS, "on_save", "on_checkpoint", "on_end")
"""Phases in which a disk, a network or user code may be slow."""
STEP_FLOOR, OTHER_FLOOR = 7.0, 30.0
"""Minimum seconds of silence before a run is late. STEP_FLOOR is for steps, OTHER_FLOOR for other phases."""
KILL_ON_CPU, KILL_ON_GPU = 60.0, 120.0
"""Defaults of `cluster.kill_after`, in seconds."""
HANG_ROOM, FIRST_HANG_ROOM = 2.5, 9.0
"""A run is late after (HANG_ROOM + FIRST_HANG_ROOM / n) x the longest of the n times that `Patience.take` recorded."""
REMEMBERED = 500
"""Number of newest observations kept for each kind of phase."""
QUIET_STEPS, QUIET_SECONDS = 3.0, 3.0
"""A run reports its silence after QUIET_STEPS median step times, but not before QUIET_SECONDS seconds."""


def patience_of(cluster: Cluster) -> "Patience":
    """Return the patience of a run with these settings."""
    return Patience(cluster.hang_after, cluster.start_timeout, cluster.kill_after, cluster.timeout)


class Patience:
    """Observed times of a run in seconds, and the limits derived from them.

    hang_after: maximum of every limit during steps
    start_timeout: maximum of every limit in other phases
    kill_after: the run is not ended earlier than after this time without progress; None: KILL_ON_CPU or KILL_ON_GPU
    timeout: minimum of `kill_after` in a save, an upload or a callback
    """

    def __init__(
        self, hang_after: float, start_timeout: float, kill_after: float | None = None, timeout: float = 600.0
    ):
        self._hang_after, self._start_timeout = hang_after, start_timeout
        self._kill_after, self._timeout = kill_after, timeout
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._done = set[str]()
        """Phases that have been completed at least once."""
        self._work = 1.0
        self.on_gpu = False
        """Whether ranks compute on GPUs."""

    def take(self, doing: str, seconds: float) -> None:
        """Record the duration of a step, or of another phase's silence."""
        self._seconds[doing].append(seconds)

    def finish(self, doing: str) -> None:
        """Record that a phase is complete. From now on, its recorded times are used for the limits."""
        self._done.add(doing)

    def take_work(self, sequences: float) -> None:
        """Set the number of sequences in each later step. If it grows, the known step times are scaled up."""
        if sequences > self._work:
            growth = sequences / self._work
            self._seconds[STEP_PHASE] = deque((growth * seconds for seconds in self._seconds[STEP_PHASE]), REMEMBERED)
        self._work = sequences

    def forget_steps(self) -> None:
        """Forget all step times. Call it when the layout changes."""
        self._seconds[STEP_PHASE].clear()

    def limit(self, doing: str) -> float:
        """Return the seconds of silence after which the run is late."""
        ceiling, floor = self._ceiling(doing), STEP_FLOOR if doing in STEP_PHASES else OTHER_FLOOR
        kind = STEP_PHASE if doing in STEP_PHASES else doing
        times = self._seconds[kind] if kind in self._done and doing != START_PHASE else ()
        room = HANG_ROOM + FIRST_HANG_ROOM / max(1, len(times))
        return min(ceiling, max(floor, room * max(times, default=ceiling)))

    def kill_limit(self, doing: str) -> float:
        """Return the seconds without progress after which the run is ended."""
        floor = self._kill_after or (KILL_ON_GPU if self.on_gpu else KILL_ON_CPU)
        if doing in PATIENT_PHASES:
            floor = max(floor, self._timeout)
        return min(self._ceiling(doing), max(floor, self.limit(doing)))

    def _ceiling(self, doing: str) -> float:
        return self._hang_after if doing in STEP_PHASES else self._start_timeout

    def usual_step(self) -> float | None:
        """Return the median step time in seconds; None below 5 observations."""
        times = sorted(self._seconds[STEP_PHASE])
        return times[len(times) // 2] if len(times) >= 5 else None
