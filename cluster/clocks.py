"""Defines two clocks. `SteadyClock` returns a time of day that stays correct when somebody changes the system's clock.
`HeldUp` measures how long the process was held up.
"""

import time

_COUNTER = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Id of the clock that `uptime` reads. CLOCK_BOOTTIME also counts while the machine sleeps, but only Linux has it."""


def uptime() -> float:
    """Return the seconds since this host started. All processes of the host share this clock, and nobody can set it."""
    return time.clock_gettime(_COUNTER)


class SteadyClock:
    """A clock that returns Unix time in seconds. It reads the system's Unix time once, at construction. Later times
    follow from `uptime`.
    """

    def __init__(self) -> None:
        self._ahead = time.time() - uptime()

    def now(self) -> float:
        return self.at(uptime())

    def at(self, uptime: float) -> float:
        """Return the Unix time at which this host had been up for `uptime` seconds."""
        return self._ahead + uptime

    def set_by(self) -> float:
        """Return the seconds by which somebody has set this machine's clock ahead since construction. The result is
        negative if somebody has set the clock back."""
        return time.time() - self.now()


class HeldUp:
    """Measures how long its process was held up between two calls of `since_last_look`.

    A busy machine or a sleeping laptop holds a process up. If a process that watches others was held up, it must not
    report the others as late.

    nap: seconds between two calls that do not count as a hold-up. now: time at construction.
    """

    def __init__(self, nap: float, now: float):
        self._nap, self._looked = nap, now

    def since_last_look(self, now: float) -> float:
        """Return the seconds for which this process was held up since the previous call; 0 if it was not held up.

        During these seconds this process watched nothing, so it must not count them as silence of another process.
        """
        held_up = max(0.0, now - self._looked - self._nap)
        self._looked = now
        return held_up
