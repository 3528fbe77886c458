"""SIGTERM and Ctrl-C ask the run to stop after the current step; a second Ctrl-C stops it at once."""

import signal
from types import FrameType


class StopRequest:
    """Remembers the first signal; `pending` is read once per step and agreed among the ranks."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous = {number: signal.signal(number, self._take) for number in (signal.SIGTERM, signal.SIGINT)}

    @property
    def pending(self) -> bool:
        return self.signal is not None

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
