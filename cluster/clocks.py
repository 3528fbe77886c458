"""Clocks: `SteadyClock` ignores changes of the system's clock, and `HeldUp` measures delays of this process."""

import time

_COUNTER = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Id of the clock that `uptime` reads; on Linux, it includes sleep."""


def uptime() -> float:
    """Return the seconds since this host started. All processes share this clock; nobody can set it."""
    return time.clock_gettime(_COUNTER)


class SteadyClock:
    """Returns Unix time in seconds: the system's time at construction plus the growth of `uptime`."""

    def __init__(self) -> None:
        self._ahead = time.time() - uptime()

    def now(self) -> float:
        return self.at(uptime())

    def at(self, uptime: float) -> float:
        """Convert a value of `uptime` to Unix time."""
        return self._ahead + uptime

    def set_by(self) -> float:
        """Return the seconds by which the system's clock was set ahead since construction."""
        return time.time() - self.now()


class HeldUp:
    """Measures how long its process was held up (busy machine, sleeping laptop) between calls of `since_last_look`.

    nap: normal seconds between two calls.
    """

    def __init__(self, nap: float, now: float):
        self._nap, self._looked = nap, now

    def since_last_look(self, now: float) -> float:
        """Return the seconds by which the time since the previous call exceeds `nap`, or 0."""
        held_up = max(0.0, now - self._looked - self._nap)
        self._looked = now
        return held_up
