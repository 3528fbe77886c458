"""Two clocks for what is compared later: the time of day that nobody sets while a process runs, and how long the process was held up."""

import time

_COUNTER = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""The first counts on while the machine sleeps; only Linux has it."""


def uptime() -> float:
    """Seconds since this host started: all its processes have this clock, and nobody sets it."""
    return time.clock_gettime(_COUNTER)


class SteadyClock:
    """Unix time in seconds, read once when this is made and counted on from there."""

    def __init__(self) -> None:
        self._ahead = time.time() - uptime()

    def now(self) -> float:
        return self.at(uptime())

    def at(self, uptime: float) -> float:
        """The time at which this host had been up for so long."""
        return self._ahead + uptime

    def set_by(self) -> float:
        """Seconds by which somebody has set the clock of this machine ahead since; below 0 for back."""
        return time.time() - self.now()


class HeldUp:
    """Tells how long its process was held up between two looks, as by a busy machine or a laptop that slept: then nobody else is late.

    nap: seconds that it may be busy between them; now: of the first.
    """

    def __init__(self, nap: float, now: float):
        self._nap, self._looked = nap, now

    def since_last_look(self, now: float) -> float:
        """Seconds for which nobody may be blamed; 0 where the process was awake."""
        held_up = max(0.0, now - self._looked - self._nap)
        self._looked = now
        return held_up
