"""How long a run may be without news before it is said who holds it up, and how long without any progress before it is ended.

Both limits grow with what this run has shown: a run is late where it has no news for longer than such times were so far, with room for noise.
To be late costs a sentence. A run is ended only when no rank has done any piece of its work (cluster/comm_ring.py) for `cluster.kill_after`.
Nothing is learnt of a phase before the first of its kind is done. Until then, and until the first step of an attempt is done, only the
ceilings count: `cluster.hang_after` in steps, `cluster.start_timeout` in all else.
"""

from collections import defaultdict, deque

from conf.schema import Cluster

START_PHASE, STEP_PHASE = "start", "step"
STEP_PHASES = (STEP_PHASE, "on_step")
"""What ranks do between two steps, by its phase, and the hook of a callback that belongs to a step."""
PATIENT_PHASES = ("checkpoint", "on_start", "on_step", "on_save", "on_checkpoint", "on_end")
"""Phases in which a disk, a network or code of the user's works in silence: saves, uploads and callbacks."""
STEP_FLOOR, OTHER_FLOOR = 7.0, 30.0
"""Seconds without news that are never late, in steps and in all else, where a disk may be slow."""
KILL_ON_CPU, KILL_ON_GPU = 60.0, 120.0
"""Defaults of `cluster.kill_after`, in seconds."""
HANG_ROOM, FIRST_HANG_ROOM = 2.5, 9.0
"""Times the longest so far, and what is added to that, shared by how often it was seen: one observation says little."""
REMEMBERED = 500
"""Times of a kind; older ones no longer say how long it may take."""
QUIET_STEPS, QUIET_SECONDS = 3.0, 3.0
"""Usual steps without news after which a run says that it is quiet, and the least seconds."""


def patience_of(cluster: Cluster) -> "Patience":
    """The patience of a run with these settings."""
    return Patience(cluster.hang_after, cluster.start_timeout, cluster.kill_after, cluster.timeout)


class Patience:
    """What a run is used to, in seconds. hang_after, start_timeout: the ceilings, in steps and in all else. kill_after: least time
    without progress before the run is ended; None for the defaults. timeout: that in saves, uploads and callbacks, at least.
    """

    def __init__(
        self, hang_after: float, start_timeout: float, kill_after: float | None = None, timeout: float = 600.0
    ):
        self._hang_after, self._start_timeout = hang_after, start_timeout
        self._kill_after, self._timeout = kill_after, timeout
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._done = set[str]()
        """Phases of which the first of its kind is done."""
        self._work = 1.0
        self.on_gpu = False
        """Whether ranks compute on GPUs."""

    def take(self, doing: str, seconds: float) -> None:
        """A step took so long, or the ranks got on in another phase after so many seconds without news."""
        self._seconds[doing].append(seconds)

    def finish(self, doing: str) -> None:
        """One of this kind is done: what was seen of it counts from here on."""
        self._done.add(doing)

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
        """Seconds without news in this phase after which the run is late."""
        ceiling, floor = self._ceiling(doing), STEP_FLOOR if doing in STEP_PHASES else OTHER_FLOOR
        kind = STEP_PHASE if doing in STEP_PHASES else doing
        times = self._seconds[kind] if kind in self._done and doing != START_PHASE else ()
        room = HANG_ROOM + FIRST_HANG_ROOM / max(1, len(times))
        return min(ceiling, max(floor, room * max(times, default=ceiling)))

    def kill_limit(self, doing: str) -> float:
        """Seconds without any progress in this phase after which the run is ended."""
        floor = self._kill_after or (KILL_ON_GPU if self.on_gpu else KILL_ON_CPU)
        if doing in PATIENT_PHASES:
            floor = max(floor, self._timeout)
        return min(self._ceiling(doing), max(floor, self.limit(doing)))

    def _ceiling(self, doing: str) -> float:
        return self._hang_after if doing in STEP_PHASES else self._start_timeout

    def usual_step(self) -> float | None:
        """Seconds of the median step; None before enough were seen."""
        times = sorted(self._seconds[STEP_PHASE])
        return times[len(times) // 2] if len(times) >= 5 else None
