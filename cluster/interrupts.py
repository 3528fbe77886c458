"""Ctrl-C at any moment of a command: a line, an exit code, and no traceback.

While the command imports its own modules it holds nothing, and ends at once. From then on the first Ctrl-C is a KeyboardInterrupt, so that
what is open is closed, and the second one ends the process: files are written so that they bear it. An import would make another error
of a KeyboardInterrupt, and a destructor would drop it; so it is raised right after them.
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
"""Seconds until it is tried again."""
SHOW_CURSOR = "\x1b[?25h"
IMPORTS = "<frozen importlib._bootstrap>"


def end_at_once(text: str) -> None:
    """Say it, and end the process without what libraries want to do at its end."""
    if sys.stderr.isatty():  # a bar hides the cursor
        text = f"{SHOW_CURSOR}\n{text}"
    os.write(2, f"{text}\n".encode())  # a print may be what was interrupted
    os._exit(EXIT_INTERRUPTED)


def interrupt(number: int = signal.SIGALRM, frame: FrameType | None = None) -> None:
    """Raise StopInterrupt, or where that would be lost do it as soon as it would not: a handler of signals."""
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
    """In this block these signals go to this handler."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def every_interrupt() -> AbstractContextManager[None]:
    """In this block each Ctrl-C is a KeyboardInterrupt, and none ends the process: for conversations, in which it ends a reply."""
    return handled(interrupt, signal.SIGINT)


class Interrupts:
    """Takes Ctrl-C for the command, until a training has its own way with it (train/loop/stop.py)."""

    def __init__(self) -> None:
        """Make it before the command imports its modules."""
        self.code = EXIT_INTERRUPTED
        """The exit code that an interrupt ends the command with, once it is known."""
        self._process, self._begun, self._ended, self._asked = os.getpid(), False, False, False
        signal.signal(signal.SIGINT, self._take)

    def __enter__(self) -> None:
        """The command has its modules: from here on there may be something to close."""
        self._begun = True
        sys.unraisablehook = self._dropped

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> bool:
        self._ended = True
        signal.setitimer(signal.ITIMER_REAL, 0)  # at the end of Python nobody handles SIGALRM, and it would kill
        if interrupted := kind is not None and issubclass(kind, KeyboardInterrupt):
            os.write(2, f"{NOTHING_STARTED}\n".encode())
        return interrupted

    def _take(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a fork of this process, which ends with it
            os._exit(EXIT_INTERRUPTED)
        if self._ended:  # all is done but what libraries do at the end
            os._exit(self.code)
        if not self._begun:
            end_at_once(NOTHING_STARTED)
        if self._asked:
            end_at_once("ended at once by a second Ctrl-C")
        self._asked = True
        interrupt(number, frame)

    def _dropped(self, found: Any) -> None:
        """An error where nobody can catch one."""
        if isinstance(found.exc_value, KeyboardInterrupt):
            if self._ended:
                return
            signal.signal(signal.SIGALRM, interrupt)
            signal.setitimer(signal.ITIMER_REAL, RAISE_AGAIN_S)
        else:
            sys.__unraisablehook__(found)


# The end of a command where libraries, and Python itself, would hold it up.
#
# Ray's own farewell, at the end of the interpreter, waits for more than a minute for a head that is gone, and then ends the process
# with an exit code of its own. Behind all farewells Python takes the modules of torch and of others apart, one object after another,
# for 0.9 s of a core, though the process ends with them anyway.

_short = threading.Event()
_codes: list[int] = []
"""What `leave` was given."""


def cut_short() -> None:
    """Let `leave` end this process without what libraries wanted to do at its end."""
    _short.set()


def leave(code: int) -> int:
    """The last thing that a command does: returns its exit code, with which the process ends when threads and libraries have come to their
    end, or at once where `cut_short` was called.
    """
    _codes.append(code)
    if _short.is_set():
        _end()
    return code


@atexit.register
def _end() -> None:
    """After what libraries do at the end of Python, as this module is imported before them and such functions run last to first."""
    if _codes:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_codes[-1])
