"""The time of day for what is compared later: a clock that nobody sets while a process runs."""

import time

_COUNTER = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""The first counts on while the machine sleeps; only Linux has it."""


class SteadyClock:
    """Unix time in seconds, read once when this is made and counted on from there."""

    def __init__(self) -> None:
        self._ahead = time.time() - time.clock_gettime(_COUNTER)

    def now(self) -> float:
        return self._ahead + time.clock_gettime(_COUNTER)

    def set_by(self) -> float:
        """Seconds by which somebody has set the clock of this machine ahead since; below 0 for back."""
        return time.time() - self.now()
