"""The ranks of a run as child processes of one driver on this machine.

When a rank fails, its peers lose their connection and fail too, often sooner. So the report names the cause, not the
first process to end: a rank that vanished without a word (killed, crashed in native code), else the rank that
never came out of a collective while the others timed out, else the earliest error by its own clock.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from conf.errors import EXIT_CRASH, EXIT_OK, EXIT_STOPPED, EXIT_USER

SETTLE = 3.0
"""Seconds that the other ranks get to report after the first one failed."""


@dataclass
class Failure:
    """What one rank had to say when it failed; written by the rank, read by the driver."""

    rank: int
    time: float
    kind: str
    """user, timeout or crash."""
    message: str
    code: int

    def write(self, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        temporary = logs / f".rank_{self.rank}.error.tmp"
        temporary.write_text(json.dumps(self.__dict__))
        temporary.rename(logs / f"rank_{self.rank}.error.json")


def run_local(command: list[str], world: int, logs: Path) -> int:
    """Start `world` ranks, wait for all, end all when one fails; returns the exit code of the run."""
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("rank_*.error.json"):
        old.unlink()
    ranks = _start(command, world, logs)
    previous = {
        number: signal.signal(number, lambda number, _: _forward(ranks)) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        return _watch(ranks, logs)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _end(ranks)


def _start(command: list[str], world: int, logs: Path) -> list[subprocess.Popen]:
    environment = os.environ | {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    ranks = []
    for rank in range(world):
        # Rank 0 keeps the terminal: it draws the progress. The others write to their logs.
        output = None if rank == 0 else (logs / f"rank_{rank}.log").open("w")
        ranks.append(
            subprocess.Popen(
                command,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,  # Ctrl-C reaches the driver alone, which passes it on once
                preexec_fn=_die_with_parent,
            )
        )
        if output:
            output.close()
    return ranks


def _watch(ranks: list[subprocess.Popen], logs: Path) -> int:
    while True:
        codes = [rank.poll() for rank in ranks]
        if all(code in (EXIT_OK, EXIT_STOPPED) for code in codes):
            return max(codes)
        bad = any(code not in (None, EXIT_OK, EXIT_STOPPED) for code in codes)
        if bad or any(logs.glob("rank_*.error.json")):
            return _explain(ranks, logs)
        time.sleep(0.05)


def _explain(ranks: list[subprocess.Popen], logs: Path) -> int:
    """Give the others a moment to report, then name the cause."""
    deadline = time.monotonic() + SETTLE
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(0.05)
    codes = [rank.poll() for rank in ranks]
    failures = {
        failure.rank: failure
        for failure in (Failure(**json.loads(path.read_text())) for path in logs.glob("rank_*.error.json"))
    }
    vanished = [n for n, code in enumerate(codes) if code not in (None, EXIT_OK, EXIT_STOPPED) and n not in failures]
    silent = [n for n, code in enumerate(codes) if code is None and n not in failures]
    first = min(failures.values(), key=lambda failure: failure.time, default=None)
    if first is not None and first.kind == "user":
        print(f"error: {first.message}", file=sys.stderr)
        return EXIT_USER
    if vanished:
        text = "\n".join(f"rank {n} ended by {_how(codes[n])}" for n in vanished)
        cause = vanished[0]
    elif first is not None and first.kind == "timeout" and silent:
        text = (
            f"rank {', '.join(map(str, silent))} hangs: no answer while the other ranks waited for it in a collective"
        )
        cause = silent[0]
    else:
        assert first is not None
        text, cause = f"rank {first.rank} failed:\n{first.message}", first.rank
    others = sorted(set(range(len(ranks))) - {cause})
    print(f"error: {text}\n  ended with it: ranks {others}\n  logs: {logs}", file=sys.stderr)
    return first.code if first is not None and not vanished and not silent else EXIT_CRASH


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code} without an error message"
    return f"signal {signal.Signals(-code).name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")


def _forward(ranks: list[subprocess.Popen]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signal.SIGTERM)


def _end(ranks: list[subprocess.Popen]) -> None:
    """Leave no child behind."""
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
    for rank in ranks:
        rank.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _die_with_parent() -> None:
    """Ask the kernel to kill this child when the driver dies, however it dies."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
