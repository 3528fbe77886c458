"""Where every thread of a rank is, on request: SIGUSR1 makes it write that to a file of its logs."""

import contextlib
import faulthandler
import os
import re
import signal
import sys
import tempfile
from pathlib import Path
from typing import IO

from cluster.run_files import stacks_path

STACKS_BYTES = 256 << 10
"""Most bytes of a rank's stacks; many threads have more than anybody reads."""
_kept_open: list[IO] = []


def answer_requests(logs: Path | None, rank: int) -> None:
    """From here on this process writes its stacks at SIGUSR1: to the file of `stacks_path`, or to stderr where there are no logs."""
    if logs is None:
        faulthandler.register(
            signal.SIGUSR1, sys.__stderr__ or sys.stderr, all_threads=True
        )  # a notebook's own has no file
        return
    logs.mkdir(parents=True, exist_ok=True)
    file = stacks_path(logs, rank).open("a")
    faulthandler.register(signal.SIGUSR1, file, all_threads=True)
    _kept_open.append(file)


def ask_stacks(logs: Path, rank: int, pid: int) -> bool:
    """Ask a rank for its stacks; returns whether it can answer. The signal would end a rank that still imports."""
    if not handles(pid, signal.SIGUSR1):
        return False
    with contextlib.suppress(FileNotFoundError):
        os.truncate(stacks_path(logs, rank), 0)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR1)
    return True


def own_stacks() -> str:
    """Where the threads of this process are."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def read_stacks(logs: Path, rank: int) -> str | None:
    """What it wrote since it was asked, or None before that is whole. What was printed in part would tell that a rank waits for nobody."""
    with contextlib.suppress(FileNotFoundError), stacks_path(logs, rank).open("rb") as file:
        piece = file.read(STACKS_BYTES)
        text = piece.decode(errors="replace")
        return text if len(piece) == STACKS_BYTES or _is_whole(text) else None
    return None


def _is_whole(stacks: str) -> bool:
    """Whether faulthandler has printed all threads: the main one comes last, and its outermost function at its end."""
    _, header, last = stacks.rpartition("(most recent call first):\n")
    return bool(header and re.search(r" in (<module>|_run_module_as_main)\n|^  \.\.\.\n", last, re.MULTILINE))


def handles(pid: int, number: int) -> bool:
    """Whether the process has a handler for this signal."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return False
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)
