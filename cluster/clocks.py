"""Two clocks: a time of day that nobody sets during a process, and a measure of how long it was held up."""

import time

_COUNTER = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""CLOCK_BOOTTIME also counts while the machine sleeps; only Linux has it."""


def uptime() -> float:
    """Return the seconds since this host started. All processes of the host share this clock, and nobody sets it."""
    return time.clock_gettime(_COUNTER)


class SteadyClock:
    """Unix time in seconds, read once at construction and counted on from there."""

    def __init__(self) -> None:
        self._ahead = time.time() - uptime()

    def now(self) -> float:
        return self.at(uptime())

    def at(self, uptime: float) -> float:
        """Return the Unix time at which this host had been up for `uptime` seconds."""
        return self._ahead + uptime

    def set_by(self) -> float:
        """Return the seconds by which somebody has set this machine's clock ahead since; negative if it was set
        back.
        """
        return time.time() - self.now()


class HeldUp:
    """Measures how long its process was held up between two looks.

    A busy machine or a sleeping laptop holds a process up. A watcher that was held up must not call others late. nap:
    seconds that the process may be busy between two looks; now: time of the first look.
    """

    def __init__(self, nap: float, now: float):
        self._nap, self._looked = nap, now

    def since_last_look(self, now: float) -> float:
        """Return the seconds for which no other process may be blamed; 0 if this process was not held up."""
        held_up = max(0.0, now - self._looked - self._nap)
        self._looked = now
        return held_up
