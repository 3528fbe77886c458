"""Starts a rank as a child process that ends with its parent."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import psutil

from conf.schema import Config

PR_SET_PDEATHSIG = 1
"""The prctl option that makes the kernel send a signal when the parent dies."""
LEASE = 4.0
"""An agent kills its ranks after this number of heartbeats without a question from the driver."""
ENDING = 60.0
"""Seconds that a killed rank may need to free its memory."""


def longest_afterlife(config: Config) -> float:
    """Return the maximum seconds that a rank outlives its killed driver."""
    return ENDING + (LEASE * config.cluster.heartbeat if config.cluster.backend == "ray" else 0.0)


def spawn(
    command: list[str],
    environment: dict[str, str],
    output: IO | int | None,
    folder: str | None = None,
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen:
    """Start a child process in its own session, which Ctrl-C does not reach. The kernel kills it if this process dies.

    output: file for stdout and stderr; None for the terminal. folder: working folder; None for this process's folder.
    """
    bind, parent = _binder(), os.getpid()
    return subprocess.Popen(
        command,
        env=environment,
        cwd=folder,
        stdin=stdin,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: bind(parent),
    )


class ForkedProcess:
    """A child process that is forked, so it has the parent's imported modules. Its methods are those of Popen that
    cluster/local.py uses.

    The child dies with its parent. The parent must not have computed anything: OpenMP threads and GPU contexts do not
    survive a fork.
    """

    def __init__(self, work: Callable[[], int], environment: dict[str, str], output: IO | None):
        """Fork the child.

        work: function that the child runs; it returns the exit code. output: file for stdout and stderr, or None.
        """
        bind, parent = _binder(), os.getpid()

        def run() -> None:
            os.setsid()
            bind(parent)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            os.environ.update(environment)
            if output is not None:
                for stream in (1, 2):
                    os.dup2(output.fileno(), stream)
            sys.exit(work())

        self._process = multiprocessing.get_context("fork").Process(target=run)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def die_with_parent() -> None:
    """Make the kernel kill this process when its parent dies, even if the parent becomes a zombie."""
    _binder()(os.getppid())


def _binder() -> Callable[[int], None]:
    """Return a function that makes the calling process die with its parent.

    Call `_binder` before a fork: it loads a library, which a child of a process with threads must not do.
    """
    prctl = ctypes.CDLL(None).prctl

    def bind(parent: int) -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before prctl was called
            os.kill(os.getpid(), signal.SIGKILL)

    return bind


def lives(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def holds_open(pid: int, path: Path) -> bool:
    """Whether this user's process `pid` has the file `path` open. If not, do not signal it: the id may be reused or
    untrusted.
    """
    with contextlib.suppress(OSError):
        wanted = os.lstat(path)
        for handle in os.scandir(f"/proc/{pid}/fd") if os.stat(f"/proc/{pid}").st_uid == os.geteuid() else ():
            with contextlib.suppress(OSError):  # the process has closed the file meanwhile
                if os.path.samestat(os.stat(handle.path), wanted):
                    return True
    return False


def processes_named(name: str) -> list[tuple[psutil.Process, list[str]]]:
    """Return this host's processes with this name and their command lines, without zombies and unreadable processes."""
    found = psutil.process_iter(["name", "cmdline"])
    return [(one, one.info["cmdline"]) for one in found if one.info["name"] == name and one.info["cmdline"]]


def is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped the process."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.NoSuchProcess:
        return False


def waited_for_core(pid: int) -> float:
    """Return the seconds in which a process's main thread waited for a core; 0 if unknown."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0
