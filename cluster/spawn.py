"""A rank as a child process."""

import ctypes
import signal
import subprocess
from typing import IO

_PRCTL = ctypes.CDLL(None).prctl  # looked up here, as a fresh fork of a threaded process must not load libraries


def spawn(
    command: list[str],
    environment: dict[str, str],
    output: IO | int | None,
    folder: str | None = None,
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen:
    """Start it in a session of its own: Ctrl-C reaches the driver alone, which passes it on once. However this process dies,
    the kernel kills the child with it.

    output: of both streams; None leaves the child the terminal. folder: to work in; None for that of this process.
    """
    return subprocess.Popen(
        command,
        env=environment,
        cwd=folder,
        stdin=stdin,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1
    _PRCTL(pr_set_pdeathsig, signal.SIGKILL)
