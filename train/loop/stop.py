"""Handles the signals that ask a run to save its state and stop after the current step.

- SIGTERM or Ctrl-C: saves a checkpoint. Before the first step is done, stops the run at once.
- A second Ctrl-C: stops the run at once.
- SIGUSR2: copies the state to memory.
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
    """The next attempt resumes at once from the copies in memory."""
    on_disk = 2


class StopRequest:
    """Remembers how the run was asked to stop. SIGTERM and Ctrl-C replace an earlier SIGUSR2."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.has_stepped = False
        """Whether this attempt has completed a step.

        Before the first step is complete, a signal ends the attempt at once.
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
