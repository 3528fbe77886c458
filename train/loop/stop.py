"""Handles the signals that ask a run to save its state and stop after the current step.

SIGTERM or Ctrl-C: saves a checkpoint. SIGUSR2: copies the state to memory, if the run keeps such copies. A second
Ctrl-C, and any SIGTERM or Ctrl-C before the first step is done, stops the run at once.
"""

import signal
from enum import Enum
from types import FrameType

from cluster.interrupts import end_at_once, interrupt
from conf.errors import StopInterrupt


class StopKind(Enum):
    """How a run must end after a step."""

    none = 0
    in_memory = 1
    """The next attempt starts right away, and resumes from the copies in memory."""
    on_disk = 2


class StopRequest:
    """Remembers the first signal. A later request to save on disk replaces a request to copy to memory.

    In every step all ranks read `pending`, and agree on one value.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.has_stepped = False
        """Whether this attempt has completed a step. Before that, there is no new state to save.

        So SIGTERM or Ctrl-C ends the run at once, because the first step of a large model may take very long.
        """
        numbers = signal.SIGTERM, signal.SIGINT, signal.SIGUSR2
        self._previous = {number: signal.signal(number, self._take) for number in numbers}

    @property
    def pending(self) -> StopKind:
        if self.signal is None:
            return StopKind.none
        return StopKind.in_memory if self.signal == signal.SIGUSR2 else StopKind.on_disk

    def _take(self, number: int, frame: FrameType | None) -> None:
        if not self.has_stepped and number != signal.SIGUSR2:
            if self.signal is not None and number == signal.SIGINT:
                end_at_once("ended at once by a second Ctrl-C")
            self.signal = number
            interrupt(number, frame)
            return
        if self.signal is not None and number == signal.SIGINT:
            raise StopInterrupt
        if number != signal.SIGUSR2 or self.signal is None:
            self.signal = number

    def close(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
