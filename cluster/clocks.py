"""Two clocks. `SteadyClock` stays correct when somebody sets the system's clock. `HeldUp` measures how long the process
was held up.
"""

import time

_COUNTER = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Id of the clock that `uptime` reads. CLOCK_BOOTTIME includes sleep, but only Linux has it."""


def uptime() -> float:
    """Return the seconds since this host started. All processes of the host share this clock, and nobody can set it."""
    return time.clock_gettime(_COUNTER)


class SteadyClock:
    """Returns Unix time in seconds. The system's clock is read once, at construction; later times follow from `uptime`."""

    def __init__(self) -> None:
        self._ahead = time.time() - uptime()

    def now(self) -> float:
        return self.at(uptime())

    def at(self, uptime: float) -> float:
        """Return the Unix time at which this host had been up for `uptime` seconds."""
        return self._ahead + uptime

    def set_by(self) -> float:
        """Return the seconds by which the machine's clock was set ahead since construction; negative if set back."""
        return time.time() - self.now()


class HeldUp:
    """Measures how long its process was held up (busy machine, sleeping laptop) between two calls of `since_last_look`.

    nap: normal seconds between two calls. now: time at construction.
    """

    def __init__(self, nap: float, now: float):
        self._nap, self._looked = nap, now

    def since_last_look(self, now: float) -> float:
        """Return the seconds for which this process was held up since the previous call."""
        held_up = max(0.0, now - self._looked - self._nap)
        self._looked = now
        return held_up
