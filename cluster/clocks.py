"""Defines two clocks. `SteadyClock` gives a time of day that no clock change affects. `HeldUp` measures how long the
process was held up.
"""

import time

_COUNTER = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""The clock's id. CLOCK_BOOTTIME also counts while the machine sleeps, but only Linux has it."""


def uptime() -> float:
    """Return the seconds since this host started. All processes of the host share this clock, and nobody can set it."""
    return time.clock_gettime(_COUNTER)


class SteadyClock:
    """Unix time in seconds. It is read once at construction; later times follow from `uptime`."""

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
    """Measures how long its process was held up between two looks.

    A busy machine or a sleeping laptop holds a process up. A watching process that was held up must not report others
    as late. nap: seconds that the process may be busy between two looks. now: time of the first look.
    """

    def __init__(self, nap: float, now: float):
        self._nap, self._looked = nap, now

    def since_last_look(self, now: float) -> float:
        """Return the seconds for which this process was held up since the last look; 0 if it was not held up. No other
        process may be blamed for this time."""
        held_up = max(0.0, now - self._looked - self._nap)
        self._looked = now
        return held_up
