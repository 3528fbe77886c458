"""The end of a command where a library would hold it up.

Ray's own farewell, at the end of the interpreter, waits for more than a minute for a head that is gone, and then ends the process
with an exit code of its own.
"""

import os
import sys
import threading

_short = threading.Event()


def cut_short() -> None:
    """Let `leave` end this process without what libraries wanted to do at its end."""
    _short.set()


def leave(code: int) -> int:
    """The last thing that a command does: returns its exit code, or ends the process with it where `cut_short` was called."""
    if _short.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
