"""A rank as a child process."""

import ctypes
import signal
import subprocess
from typing import IO

PR_SET_PDEATHSIG = 1
"""Of prctl: the signal that a process gets when its parent dies."""


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
    prctl = ctypes.CDLL(None).prctl  # looked up here, as a fresh fork of a threaded process must not load libraries
    return subprocess.Popen(
        command,
        env=environment,
        cwd=folder,
        stdin=stdin,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
    )
