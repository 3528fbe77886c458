"""Makes Ctrl-C end a command at any moment with one line and an exit code, and without a traceback.

During the command's imports, Ctrl-C ends it at once. Later, the first Ctrl-C raises KeyboardInterrupt, so that
resources are closed. The second Ctrl-C ends the process and damages no file.
"""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

from conf.errors import EXIT_INTERRUPTED, StopInterrupt

RAISE_AGAIN_S = 0.05
"""Seconds until a KeyboardInterrupt that Python would lose is raised again."""
SHOW_CURSOR = "\x1b[?25h"
IMPORTS = "<frozen importlib._bootstrap>"


def end_at_once(text: str) -> None:
    """Print the text and end the process without exit handlers."""
    if sys.stderr.isatty():  # a progress bar hides the cursor
        text = f"{SHOW_CURSOR}\n{text}"
    os.write(2, f"{text}\n".encode())  # os.write, because the interrupted code may be a print
    os._exit(EXIT_INTERRUPTED)


def interrupt(number: int = signal.SIGALRM, frame: FrameType | None = None) -> None:
    """Signal handler that raises StopInterrupt. An import would lose the exception, so a timer calls the handler again."""
    if _imports(frame):
        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, RAISE_AGAIN_S)
        return
    raise StopInterrupt


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == IMPORTS:
            return True
        frame = frame.f_back
    return False


NOTHING_STARTED = "stopped by Ctrl-C; nothing was started"


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """Use this handler for these signals inside the `with` block."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def every_interrupt() -> AbstractContextManager[None]:
    """Make every Ctrl-C in the `with` block raise KeyboardInterrupt, and never end the process."""
    return handled(interrupt, signal.SIGINT)


class Interrupts:
    """Handles Ctrl-C until a training installs its own handler (train/loop/stop.py)."""

    def __init__(self) -> None:
        """Handle Ctrl-C from now on. Create it before the command's imports."""
        self.code = EXIT_INTERRUPTED
        """Exit code of this process: that of Ctrl-C or, after the command has returned, the code of the command."""
        self._process, self._begun, self._ended, self._asked = os.getpid(), False, False, False
        signal.signal(signal.SIGINT, self._take)

    def __enter__(self) -> None:
        """Record that the imports are complete, so that resources may be open."""
        self._begun = True
        sys.unraisablehook = self._dropped

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> bool:
        self._ended = True
        # When Python exits, nobody handles SIGALRM, and the signal would kill the process.
        signal.setitimer(signal.ITIMER_REAL, 0)
        if interrupted := kind is not None and issubclass(kind, KeyboardInterrupt):
            os.write(2, f"{NOTHING_STARTED}\n".encode())
        return interrupted

    def _take(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # this process is a fork, which must end together with its parent
            os._exit(EXIT_INTERRUPTED)
        if self._ended:  # only exit handlers of libraries still run
            os._exit(self.code)
        if not self._begun:
            end_at_once(NOTHING_STARTED)
        if self._asked:
            end_at_once("ended at once by a second Ctrl-C")
        self._asked = True
        interrupt(number, frame)

    def _dropped(self, found: Any) -> None:
        """Handle an error that Python cannot raise (sys.unraisablehook)."""
        if isinstance(found.exc_value, KeyboardInterrupt):
            if self._ended:
                return
            signal.signal(signal.SIGALRM, interrupt)
            signal.setitimer(signal.ITIMER_REAL, RAISE_AGAIN_S)
        else:
            sys.__unraisablehook__(found)


# Exits at once and skips slow library shutdown.
#
# When the interpreter ends, Ray waits for more than a minute for a head process that is gone, and then sets its own
# exit code. After all exit handlers, Python takes 0.9 s of a core to destroy the modules of torch and other libraries.

_short = threading.Event()
_codes: list[int] = []
"""Exit codes that were passed to `leave`."""


def cut_short() -> None:
    """Make `leave` end this process without the exit handlers of libraries."""
    _short.set()


def leave(code: int) -> int:
    """Return the exit code of a command; call it last. The process ends after threads and libraries have finished, or
    at once after `cut_short`.
    """
    _codes.append(code)
    if _short.is_set():
        _end()
    return code


@atexit.register
def _end() -> None:
    """End the process, after the exit handlers of libraries have run."""
    if _codes:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_codes[-1])
