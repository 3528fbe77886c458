"""Collects the stacks of a rank's threads. SIGUSR1 makes a rank write its stacks to a file in its logs.

The result also names the hosts that have not acknowledged the rank's TCP data. For a hung rank, pystack adds native
threads, if it is installed and permitted.
"""

import contextlib
import ctypes
import faulthandler
import ipaddress
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from cluster.cause import NATIVE_HEAD, waits_for_ranks
from cluster.run_files import stacks_path
from cluster.spawn import is_stopped, spawn
from conf.files import open_plain

STACKS_BYTES = 256 << 10
"""Maximum bytes of a rank's stacks."""
STACKS_LOOK_SECONDS = 0.05
"""Seconds after which the requested stacks are checked again."""
PYSTACK = Path(sys.executable).with_name("pystack")
NO_PYSTACK = ["echo", "it is not installed; run `pip install pystack`"]
"""Command that runs if pystack is missing; it prints how to install pystack."""
NATIVE_SECONDS = 1.5
"""Maximum seconds that pystack may take."""
PR_SET_PTRACER = 0x59616D61
"""The prctl option that lets another process and its descendants inspect this process. Without it, Linux's Yama module
forbids this.
"""
_natives: dict[int, tuple[subprocess.Popen, float]] = {}
"""Running pystack processes by inspected process id, with their deadlines."""
TCP_ESTABLISHED = "01"
"""The state of an established connection in /proc/net/tcp."""
TCP_RETRANSMITS = "01:"
"""Prefix of the timer field in /proc/net/tcp while sent data is not acknowledged. If the receiver's buffer is full, the
prefix is another one.
"""
_kept_open: list[IO] = []


def answer_requests(logs: Path | None, rank: int) -> None:
    """Make this process write the stacks of its threads at SIGUSR1: to the file `stacks_path`, or to stderr if `logs`
    is None. Also allow the parent process and its children to inspect this process.
    """
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, os.getppid())
    if logs is None:
        faulthandler.register(
            signal.SIGUSR1, sys.__stderr__ or sys.stderr, all_threads=True
        )  # in a notebook, sys.stderr has no file
        return
    logs.mkdir(parents=True, exist_ok=True)
    file = open(stacks_path(logs, rank), "a", opener=open_plain)  # noqa: SIM115  open as long as this process lives
    faulthandler.register(signal.SIGUSR1, file, all_threads=True)
    _kept_open.append(file)


def ask_stacks(logs: Path, rank: int, pid: int) -> bool:
    """Ask a rank for its stacks. Returns whether it can answer. During a rank's imports, the signal would end it."""
    if not handles(pid, signal.SIGUSR1):
        return False
    with contextlib.suppress(OSError), open(stacks_path(logs, rank), "r+b", opener=open_plain) as file:
        file.truncate(0)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGUSR1)
        return True
    return False


def gather_stacks(logs: Path, pids: Mapping[int, int], seconds: float, native: bool = False) -> dict[int, str]:
    """Return the stacks of the processes that answer within `seconds`, by rank. pids: process ids by rank. native: see
    `read_stacks`.
    """
    asked = [rank for rank, pid in pids.items() if not is_stopped(pid) and ask_stacks(logs, rank, pid)]
    ends, stacks = time.monotonic() + seconds, dict[int, str]()
    while len(stacks) < len(asked) and time.monotonic() < ends:
        time.sleep(STACKS_LOOK_SECONDS)
        late = [rank for rank in asked if rank not in stacks]
        stacks |= {rank: text for rank in late if (text := read_stacks(logs, rank, pids[rank], native))}
    return stacks


def own_stacks() -> str:
    """Return the stacks of this process's threads."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def read_stacks(logs: Path, rank: int, pid: int, native: bool = False) -> str | None:
    """Return the stacks that a rank wrote since the request; None before they are complete.

    native: whether to add the native stacks of the threads. pystack stops the rank for about a second to read them, so
        they are added only if the rank waits for no other rank.
    """
    with contextlib.suppress(OSError), open(stacks_path(logs, rank), "rb", opener=open_plain) as file:
        piece = file.read(STACKS_BYTES)
        text = piece.decode(errors="replace")
        if len(piece) < STACKS_BYTES and not _is_whole(text):
            return None
        threads = _native_threads(logs, rank, pid) if native and not waits_for_ranks(text) else ""
        return None if threads is None else text + unanswered(pid) + threads
    return None


def _native_threads(logs: Path, rank: int, pid: int) -> str | None:
    """Return pystack's output for the process; None while it runs."""
    path = stacks_path(logs, rank).with_suffix(".native")
    if pid not in _natives:
        words = [str(PYSTACK), "remote", "--native-all", "--no-color", str(pid)] if PYSTACK.exists() else NO_PYSTACK
        with open(path, "wb", opener=open_plain) as said:
            _natives[pid] = spawn(words, dict(os.environ), said), time.monotonic() + NATIVE_SECONDS
    process, ends = _natives[pid]
    if process.poll() is None and time.monotonic() < ends:
        return None
    process.kill()
    process.wait()
    del _natives[pid]
    with open(path, "rb", opener=open_plain) as said:
        text = said.read(STACKS_BYTES).decode(errors="replace")
    return f"{NATIVE_HEAD}\n{text}" if text else f"{NATIVE_HEAD}no answer within {NATIVE_SECONDS:g} s\n"


def is_looked_into(pid: int) -> bool:
    """Whether pystack is inspecting the process, which then looks stopped."""
    return pid in _natives


def unanswered(pid: int) -> str:
    """Return text with the IP address of process `pid` and the hosts that have not acknowledged its TCP data, if any."""
    own, late = Counter[str](), set[str]()
    with contextlib.suppress(OSError):
        sockets = {
            link[8:-1] for fd in os.scandir(f"/proc/{pid}/fd") if (link := _link(fd.path)).startswith("socket:[")
        }
        for version in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{version}").read_text().splitlines()[1:]:
                _, here, there, state, _, timer, _, _, _, inode, *_ = line.split()
                if state == TCP_ESTABLISHED and inode in sockets and not _address(here).is_loopback:
                    own[str(_address(here))] += 1
                    late |= {str(_address(there))} if timer.startswith(TCP_RETRANSMITS) else set()
    return f"Sent from {own.most_common(1)[0][0]} and not acknowledged by: {', '.join(sorted(late))}\n" if own else ""


def _link(path: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(path)
    return ""


def _address(said: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Parse IP address and port of /proc/net/tcp. The address has groups of 4 bytes in reverse order."""
    raw = bytes.fromhex(said.partition(":")[0])
    found = ipaddress.ip_address(b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4)))
    return getattr(found, "ipv4_mapped", None) or found


def _is_whole(stacks: str) -> bool:
    """Whether faulthandler has printed all threads, the main thread last."""
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
