"""The agent of a node: it starts the node's ranks as child processes and reports their state. It does not use Ray.

`ask` waits for news and `network` for measurements, each in a thread of its own. All other methods return at once,
because a late answer counts as a lost node.

A rank reports through files (cluster/run_files.py) in the attempt's scratch folder on the node's own disk.

The environment of a rank has RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, and

    GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME    value on this node, else value on the driver, else the interface of the
                                              node's address
    SLUICE_LOGS                               path of the scratch folder
    SLUICE_ATTEMPT                            number of the attempt
    SLUICE_STORE_SECRET                       secret of the ranks' store (parallel/signed_store.py)

If an agent gets no question for `lease` seconds, not even by UDP (cluster/node/pulse_echo.py), it kills its ranks. A
new attempt may already run on other nodes.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.cause import RankReport, read_report
from cluster.clocks import SteadyClock
from cluster.comm_ring import pack_ring
from cluster.interfaces import NAMES, free_port, interface_of
from cluster.node.copy_store import OpenedCopy, Store, held, sweep, why_not_opened
from cluster.node.network_probe import NetworkProbe, NodeLink
from cluster.node.preflight import Facts, Question, gather_facts
from cluster.node.pulse_echo import Echo
from cluster.private_folder import PrivateFolder, remove_dead
from cluster.run_files import failure_path, log_path, ring_path, stop_path
from cluster.spawn import die_with_parent, spawn
from cluster.stacks import ask_stacks, handles, is_looked_into, read_stacks
from conf.errors import EXIT_STOPPED

NEWS_LOOK_SECONDS = 0.05
"""Seconds between checks for news while a question of the driver waits for an answer."""
STACKS_WITHIN = 0.25
"""Seconds after which an answer is sent with the stacks that have arrived."""
OUTPUT_BYTES = 64 << 10
"""Maximum bytes of one rank's output in one answer."""


@dataclass(frozen=True)
class Order:
    """The driver's order to start ranks on one node."""

    attempt: int
    ranks: list[tuple[int, int]]
    """The ranks, as (rank, local rank)."""
    arguments: list[str]
    """Command line of a rank, after the Python interpreter."""
    environment: dict[str, str]
    """Environment variables that are equal for all ranks of the run."""
    address: str
    """IP address of the node. Ranks use its network interface."""
    folder: str | None = None
    """Working folder of the ranks; None for the folder into which Ray unpacked the code."""


@dataclass
class Answer:
    """An agent's answer to the driver: the state of its ranks."""

    attempt: int
    ranks: list[RankReport]
    output: dict[int, bytes] = field(default_factory=dict)
    """New output of each rank, from the requested offset."""
    stacks: dict[int, str] = field(default_factory=dict)
    """Stacks that have arrived since the last request, by rank."""
    rings: dict[int, bytes] = field(default_factory=dict)
    """Compressed communication rings by rank, in the first answer after a request for stacks."""
    held: dict[str, list[int]] = field(default_factory=dict)
    """In-memory copies: ranks whose part of the state is complete, by set of copies."""
    clock_set: float = 0.0
    """Seconds by which the node's clock was set ahead since the driver's check. The times in `ranks` do not
    contain this change."""
    free_bytes: float = math.inf
    """Free bytes in the folder for temporary files."""
    leaving: bool = False
    """Whether the agent must end, because the node will be removed."""


@dataclass
class _Child:
    process: subprocess.Popen
    log: Path
    world: int
    """Number of ranks of the run."""
    stopped_by: int | None = None
    """Signal by which the agent asked the rank to stop, or None."""
    stacks_asked: bool = False
    native: bool = False
    """Whether the stacks of native threads are requested as well."""
    ring_due: bool = False
    """Whether the next answer must include the rank's communication ring."""


class Agent:
    """The agent of a node; see the top of the file.

    lease: seconds without a question after which it kills the ranks. own_process: whether the process contains only the
    agent. It then ends with its parent, SIGTERM means that the node will be removed, and the agent must be created in
    the main thread.
    """

    def __init__(self, lease: float, own_process: bool = False):
        self._lease = lease
        self._attempt = 0
        self._children: dict[int, _Child] = {}
        self._standbys: dict[tuple[str, str | None], list[subprocess.Popen]] = {}
        """Reserve processes, by imported module and working folder."""
        self._scratch: PrivateFolder | None = None
        self._asked = time.monotonic()
        self._clock = SteadyClock()
        """Clock of this node. Each call of `facts` sets it to the system time."""
        self._probe = NetworkProbe()
        self._store: Store | None = None
        self._echo: Echo | None = None
        self._leaving = False
        self._told: tuple = (0, [], [], False, {})
        """Values of `_news` in the last answer to the driver."""
        self._lock = threading.Lock()
        self._closed = threading.Event()
        if own_process:
            die_with_parent()
            signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_leaving", True))
        remove_dead(scratch_prefix())
        threading.Thread(target=self._watch_lease, daemon=True).start()

    def facts(self, question: Question) -> Facts:
        """Return the facts that the driver checks before a start. From now on, the node answers UDP questions and, for
        a network test, the other nodes.
        """
        port, self._clock = 0, SteadyClock()
        if question.tests_network:
            with contextlib.suppress(OSError):  # the network test will report the error
                port = self._probe.listen(question.address)
        if question.key and self._echo is None:
            with contextlib.suppress(OSError):  # without UDP, the driver asks this node more often through Ray
                self._echo = Echo(question.node, question.address, question.key, self._renew)
        return dataclasses.replace(
            gather_facts(question), pulse=self._echo.place if self._echo else None, test_port=port
        )

    def _renew(self) -> None:
        self._asked = time.monotonic()

    def network(self, turns: list[tuple[str, int] | None]) -> list[NodeLink]:
        """Run this node's part of the network test (cluster/driver/network.py), and wait for it."""
        return self._probe.play(turns)

    def open_memory(self, folder: str, token: str, address: str) -> OpenedCopy:
        """Open a store for in-memory copies in this folder, and serve it to other nodes."""
        try:
            self._store = Store(Path(folder), token, address, lambda: self._attempt)
        except OSError as error:
            return why_not_opened(Path(folder), error)
        threading.Thread(target=sweep, args=(Path(folder),), daemon=True).start()
        return OpenedCopy(self._store.port)

    def drop_memory(self) -> None:
        """Free the memory of the copies."""
        if self._store is not None:
            self._store.close(remove=True)
            self._store = None

    def probe(self) -> None:
        """Do nothing. An answer shows that the agent is alive."""

    def free_port(self) -> int:
        """Return a port that is free now on all addresses."""
        return free_port()

    def start(self, order: Order) -> None:
        """Start the ranks of a new attempt. Raises OSError if this fails."""
        with self._lock:
            assert order.attempt > self._attempt and not any(c.process.poll() is None for c in self._children.values())
            self._forget()
            self._probe.close()
            self._attempt, self._asked = order.attempt, time.monotonic()
            self._scratch = scratch = PrivateFolder(scratch_prefix())
            for rank, local_rank in order.ranks:
                self._children[rank] = self._spawn(order, rank, local_rank, scratch.path)
            # Ranks that start as ordered are no news: thousands of nodes would report it at once. The driver waits only
            # for the node of rank 0.
            if 0 not in self._children:
                self._told = self._attempt, [], [], *self._told[3:]

    def _spawn(self, order: Order, rank: int, local_rank: int, logs: Path) -> _Child:
        log = log_path(logs, rank)
        log.touch()
        interfaces, world = dict.fromkeys(NAMES, interface_of(order.address)), int(order.environment["WORLD_SIZE"])
        environment = (
            interfaces
            | order.environment
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(local_rank),
                "LOCAL_WORLD_SIZE": str(len(order.ranks)),
                "SLUICE_LOGS": str(logs),
                "SLUICE_ATTEMPT": str(order.attempt),
                "PYTHONUNBUFFERED": "1",
            }
        )
        environment |= {name: os.environ[name] for name in NAMES if name in os.environ}
        if standby := self._take_standby(order):
            line = {"environment": environment, "arguments": order.arguments[2:], "log": str(log)}
            assert standby.stdin is not None
            # The process has just ended; the next answer reports its exit code.
            with contextlib.suppress(BrokenPipeError):
                standby.stdin.write(json.dumps(line).encode() + b"\n")
                standby.stdin.close()
            return _Child(standby, log, world)
        with log.open("ab") as output:
            return _Child(
                self._popen(order.arguments, order.folder, environment, subprocess.DEVNULL, output), log, world
            )

    def _popen(self, arguments: list[str], folder: str | None, environment: dict, stdin: Any, output: Any) -> Any:
        return spawn([sys.executable, *arguments], _inherited() | environment, output, folder, stdin)

    def warm(self, arguments: list[str], folder: str | None, count: int) -> None:
        """Keep `count` reserve processes with the module that `arguments` names (cluster/node/standby.py)."""
        if arguments[:1] != ["-m"]:
            return
        with self._lock:
            key = arguments[1], folder
            kept = [standby for standby in self._standbys.pop(key, []) if standby.poll() is None]
            while len(kept) < count:
                words = ["-m", "cluster.node.standby", arguments[1]]
                kept.append(self._popen(words, folder, {"PYTHONUNBUFFERED": "1"}, subprocess.PIPE, subprocess.DEVNULL))
            self._standbys[key] = kept

    def _take_standby(self, order: Order) -> subprocess.Popen | None:
        kept = self._standbys.get((order.arguments[1], order.folder), []) if order.arguments[0] == "-m" else []
        while kept:
            standby = kept.pop()
            if standby.poll() is None:
                return standby
        return None

    def ask(self, offsets: dict[int, int], attempt: int | None = None, patience: float = 0.0) -> Answer:
        """Return the state of the ranks and their new output.

            offsets: for each rank, the first byte of output to return (default 0)
            attempt: the attempt of the offsets; output of other attempts is not returned
            patience: maximum seconds to wait for news

        These events are news:

            - an attempt began with rank 0 on this node
            - an attempt was ended before this node got the order to start it
            - a rank reported a failure or ended
            - a rank's part of the state in memory is complete
            - the node will be removed
        """
        self._asked = asked = time.monotonic()
        while (left := asked + patience - time.monotonic()) > 0 and not self._has_news(patience - left):
            time.sleep(min(NEWS_LOOK_SECONDS, left))
        with self._lock:
            self._told = self._news()
            answer = Answer(self._attempt, [self._report(rank, child) for rank, child in self._children.items()])
            answer.held = self._held()
            answer.leaving = self._leaving
            answer.clock_set, answer.free_bytes = self._clock.set_by(), shutil.disk_usage(tempfile.gettempdir()).free
            wanted = attempt in (None, self._attempt)
            for rank, child in self._children.items():
                if wanted and (piece := _read(child.log, offsets.get(rank, 0), OUTPUT_BYTES)):
                    answer.output[rank] = piece
                if child.stacks_asked and (
                    stacks := read_stacks(child.log.parent, rank, child.process.pid, child.native)
                ):
                    answer.stacks[rank], child.stacks_asked = stacks, False
                if child.ring_due:
                    answer.rings[rank] = pack_ring(ring_path(child.log.parent, rank), child.world)
                    child.ring_due = False
            return answer

    def last_words(self, offsets: dict[int, int], attempt: int) -> Answer:
        """Return the final state and output of the ranks at once, even during `ask`."""
        return self.ask(offsets, attempt)

    def _news(self) -> tuple:
        """Return the values that `ask` compares with the last answer; a changed value is news."""
        ended = [rank for rank, child in self._children.items() if child.process.poll() is not None]
        failed = [rank for rank, child in self._children.items() if failure_path(child.log.parent, rank).exists()]
        return self._attempt, ended, failed, self._leaving, self._held()

    def _held(self) -> dict[str, list[int]]:
        return held(self._store.folder) if self._store is not None else {}

    def _has_news(self, waited: float) -> bool:
        with self._lock:
            children = self._children.values()
            stacks = waited >= STACKS_WITHIN and any(child.stacks_asked for child in children)
            return stacks or any(child.ring_due for child in children) or self._news() != self._told

    def _report(self, rank: int, child: _Child) -> RankReport:
        code = child.process.poll()
        if child.stopped_by is not None and code == -child.stopped_by:
            code = EXIT_STOPPED
        report = read_report(rank, code, child.log.parent, child.process.pid)
        if report.failure is not None:
            report.failure.time = self._clock.at(report.failure.time)
        if is_looked_into(child.process.pid):
            report.state = ""
        return report

    def ask_stacks(self, attempt: int, native: bool = False) -> None:
        """Ask every rank for its stacks, which later answers contain. The next answer contains all rings. native:
        whether to include native threads.
        """
        if attempt != self._attempt:
            return
        for rank, child in self._children.items():
            child.ring_due = True
            if child.process.poll() is None:
                child.native = native
                child.stacks_asked = ask_stacks(child.log.parent, rank, child.process.pid)

    def stop(self, attempt: int, in_memory: bool = False, why: str = "") -> None:
        """Ask the ranks of this attempt to write a checkpoint and exit.

        in_memory: whether a copy in memory is enough; see train/loop/stop.py. why: text for rank 0's last screen.

        A rank without a signal handler is about to exit and gets no signal. A rank that the signal kills counts as
        stopped.
        """
        wanted = [signal.SIGUSR2, signal.SIGTERM] if in_memory else [signal.SIGTERM]
        if why and attempt == self._attempt and 0 in self._children:
            with contextlib.suppress(OSError):  # the disk is full; rank 0 then only knows that it got a signal
                stop_path(self._children[0].log.parent).write_text(why)
        for child in self._running() if attempt == self._attempt else []:
            handled = [number for number in wanted if handles(child.process.pid, number)]
            if handled:
                child.stopped_by = handled[0]
                child.process.send_signal(handled[0])

    def end(self, attempt: int) -> None:
        """Kill the ranks of this and older attempts, and ignore later orders to start them."""
        with self._lock:
            if attempt < self._attempt:
                return
            self._kill()
            if attempt > self._attempt:
                self._forget()
                self._attempt = attempt

    def close(self) -> None:
        """End the ranks, reserve processes and servers. The copies of the state remain in memory."""
        self._closed.set()
        if self._echo is not None:
            self._echo.close()
        self._probe.close()
        with self._lock:
            self._kill()
            self._forget()
            if self._store is not None:
                self._store.close(remove=False)
                self._store = None
            for standby in [standby for kept in self._standbys.values() for standby in kept]:
                standby.kill()
                standby.wait()
            self._standbys = {}

    def _running(self) -> list[_Child]:
        return [child for child in self._children.values() if child.process.poll() is None]

    def _kill(self) -> None:
        for child in self._running():
            # Kill the complete session: a rank may have started helper processes.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)
        for child in self._children.values():
            # A process that waits in the kernel does not end; the next answers report it as running.
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(1.0)

    def _forget(self) -> None:
        self._children = {}
        if self._scratch is not None:
            self._scratch.remove()
            self._scratch = None

    def _watch_lease(self) -> None:
        while not self._closed.wait(self._lease / 10):
            with self._lock:
                if time.monotonic() - self._asked > self._lease and self._running():
                    self._kill()


def scratch_prefix() -> str:
    """Return the prefix of scratch folder names on this host."""
    return f"sluice-agent-{socket.gethostname()}-"


def _inherited() -> dict[str, str]:
    """Return the environment without variables that Ray set."""
    drop = ("RAY_", "OMP_NUM_THREADS")
    return {name: value for name, value in os.environ.items() if not name.startswith(drop)}


def _read(path: Path, start: int, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(count)
