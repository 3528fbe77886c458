"""Where every thread of a rank is, on request: SIGUSR1 makes it write that to a file of its logs. Behind it stands what the kernel says of
its connections, who has not acknowledged what it sent; and of a rank that hangs, where its native threads are, those of libraries too, by
pystack, if that is installed and may look into the process.
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
"""Most bytes of a rank's stacks; many threads have more than anybody reads."""
STACKS_LOOK_SECONDS = 0.05
"""Between two looks for stacks that were asked for."""
PYSTACK = Path(sys.executable).with_name("pystack")
NO_PYSTACK = ["echo", "it is not installed, and `pip install pystack` does that"]
"""A command that says so."""
NATIVE_SECONDS = 1.5
"""That pystack gets."""
PR_SET_PTRACER = 0x59616D61
"""The option of prctl for whom Yama lets look into a process: another one, and its descendants."""
_natives: dict[int, tuple[subprocess.Popen, float]] = {}
"""By process, who looks into it, and until when that is waited for."""
TCP_ESTABLISHED = "01"
"""The state of a connection in /proc/net/tcp."""
TCP_RETRANSMITS = "01:"
"""The timer of one on which something is sent and not acknowledged; where the other end takes nothing more it is another."""
_kept_open: list[IO] = []


def answer_requests(logs: Path | None, rank: int) -> None:
    """From here on this process writes its stacks at SIGUSR1: to the file of `stacks_path`, or to stderr where there are no logs.
    Whoever started it, or a child of theirs, may look into it.
    """
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, os.getppid())
    if logs is None:
        faulthandler.register(
            signal.SIGUSR1, sys.__stderr__ or sys.stderr, all_threads=True
        )  # a notebook's own has no file
        return
    logs.mkdir(parents=True, exist_ok=True)
    file = open(stacks_path(logs, rank), "a", opener=open_plain)  # noqa: SIM115  open as long as this process lives
    faulthandler.register(signal.SIGUSR1, file, all_threads=True)
    _kept_open.append(file)


def ask_stacks(logs: Path, rank: int, pid: int) -> bool:
    """Ask a rank for its stacks; returns whether it can answer. The signal would end a rank that still imports."""
    if not handles(pid, signal.SIGUSR1):
        return False
    with contextlib.suppress(OSError), open(stacks_path(logs, rank), "r+b", opener=open_plain) as file:
        file.truncate(0)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGUSR1)
        return True
    return False


def gather_stacks(logs: Path, pids: Mapping[int, int], seconds: float, native: bool = False) -> dict[int, str]:
    """By rank, where the threads of these processes are, of those that say it within so many seconds. pids: by rank; native: see
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
    """Where the threads of this process are."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def read_stacks(logs: Path, rank: int, pid: int, native: bool = False) -> str | None:
    """What it wrote since it was asked, or None before that is whole. What was printed in part would tell that a rank waits for nobody.
    native: of one that waits for no other rank its native threads too, for which it is held up a second or so.
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
    """What pystack says of the process; None while it works."""
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
    """Whether pystack holds the process up now, which then looks like one that somebody stopped."""
    return pid in _natives


def unanswered(pid: int) -> str:
    """The addresses of other hosts that have not acknowledged what a process sent them by TCP, and its own; empty where there are none."""
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
    """The address in a field of /proc/net/tcp, which has words of 4 bytes, each backwards, and a port."""
    raw = bytes.fromhex(said.partition(":")[0])
    found = ipaddress.ip_address(b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4)))
    return getattr(found, "ipv4_mapped", None) or found


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
