"""The end of a command where libraries, and Python itself, would hold it up.

Ray's own farewell, at the end of the interpreter, waits for more than a minute for a head that is gone, and then ends the process
with an exit code of its own. Behind all farewells Python takes the modules of torch and of others apart, one object after another,
for 0.9 s of a core, though the process ends with them anyway.
"""

import atexit
import os
import sys
import threading

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
