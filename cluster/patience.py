"""How long a run may be without news before it counts as hung: longer than such times were so far in this run, with room for noise."""

from collections import defaultdict, deque

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
