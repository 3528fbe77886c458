"""Signals ask the run to stop after the current step: SIGTERM and Ctrl-C with a checkpoint, SIGUSR2 with a copy in memory where the
run keeps some. A second Ctrl-C stops it at once, and so does the first one before a step is done.
"""

import signal
from enum import Enum
from types import FrameType

from cluster.interrupts import end_at_once, interrupt
from conf.errors import StopInterrupt


class StopKind(Enum):
    """How a run is to end after a step."""

    none = 0
    in_memory = 1
    """The run's next attempt is at hand, and goes on from the copies."""
    on_disk = 2


class StopRequest:
    """Remembers the first signal, and one to disk rather than one to memory; `pending` is read once per step and agreed on among
    the ranks.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.has_stepped = False
        """Whether a step was done since the start, so that there is something to save. Until then the first signal ends the run at once:
        the start, or a step of a model that is far too large, may take longer than anyone waits."""
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
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
