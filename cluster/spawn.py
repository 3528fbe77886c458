"""A rank as a child process, and the end of a process with that of its parent."""

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
"""The option of prctl for the signal that a process gets when its parent dies."""
LEASE = 4.0
"""An agent kills its ranks after this many heartbeats without a question."""
ENDING = 60.0
"""Seconds that a killed rank may take to give back its memory."""


def longest_afterlife(config: Config) -> float:
    """Seconds that a rank may live on after its driver was killed."""
    return ENDING + (LEASE * config.cluster.heartbeat if config.cluster.backend == "ray" else 0.0)


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
    """A child that is a fork of this process, and so has all that it has imported: with those methods of Popen that
    cluster/local.py asks for, and tied to its parent as `spawn` ties one. The parent must not have computed: threads of OpenMP
    and contexts of a GPU do not survive a fork.
    """

    def __init__(self, work: Callable[[], int], environment: dict[str, str], output: IO | None):
        """work: what it does, in this environment; returns its exit code."""
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
    """Have the kernel kill this process when its parent dies, also where nobody reaps the dead: a parent that is a zombie
    still has a process id, by which Ray looks whether it lives.
    """
    _binder()(os.getppid())


def _binder() -> Callable[[int], None]:
    """What ties the process that calls it to its parent. Made before a fork: a fresh fork of a threaded process must not
    load libraries.
    """
    prctl = ctypes.CDLL(None).prctl

    def bind(parent: int) -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before it was asked for
            os.kill(os.getpid(), signal.SIGKILL)

    return bind


def lives(pid: int) -> bool:
    """Whether there is such a process and it still does anything: a zombie has ended, though nobody may ever reap it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def holds_open(pid: int, path: Path) -> bool:
    """Whether this process, of this user, has this very file open: then it is the one that a file of a run folder names, and may be signalled.
    The folder may be somebody else's, and the number may be of another process by now.
    """
    with contextlib.suppress(OSError):
        wanted = os.lstat(path)
        for handle in os.scandir(f"/proc/{pid}/fd") if os.stat(f"/proc/{pid}").st_uid == os.geteuid() else ():
            with contextlib.suppress(OSError):  # closed meanwhile
                if os.path.samestat(os.stat(handle.path), wanted):
                    return True
    return False


def processes_named(name: str) -> list[tuple[psutil.Process, list[str]]]:
    """This host's processes of that name, with their command lines: a zombie has none, nor one whose line may not be read."""
    found = psutil.process_iter(["name", "cmdline"])
    return [(one, one.info["cmdline"]) for one in found if one.info["name"] == name and one.info["cmdline"]]


def is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped the process."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.NoSuchProcess:
        return False


def waited_for_core(pid: int) -> float:
    """Seconds that the main thread of a process could have run so far, and had no core; 0 where the kernel does not say."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0
