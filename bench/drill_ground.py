"""The places where a drill (bench/drill.py) runs, with their faults: this machine, or several hosts on it.

A fault is a method whose docstring names it; it returns once the run should be able to recover by itself.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO

import psutil

from bench.hosts import Hosts
from cluster.driver.journal import read_events
from cluster.run_files import MANIFEST, STEP_FOLDERS
from conf.schema import ROOT

NOTICE_SECONDS = 90.0
"""Maximum wait, in seconds, until the run notices a fault."""
RETURN = 30.0
"""Maximum wait, in seconds, until the run takes back a host whose link has healed."""


class DrillGround:
    """This machine, with a separate Ray for every launch. `folder`: the folder of the run. alone: whether there is no
    Ray; then a broken rank ends the run.
    """

    overrides: tuple[str, ...] = ()
    endured = ("fill_disk", "fill_temporary")
    """Faults that do not end the attempt."""
    driver: subprocess.Popen
    """The driver process of the newest launch; it exists after the first launch."""

    def __init__(self, folder: Path, chance: random.Random, alone: bool = False):
        self.folder, self.chance, self._alone = folder, chance, alone

    def launch(self, words: list[str]) -> None:
        """Start the driver of the run."""
        with (self.folder.parent / f"{self.folder.name}.log").open("ab") as log:
            self.driver = self._start([sys.executable, "-m", "train", *words], log)

    def _start(self, words: list[str], log: IO[bytes]) -> subprocess.Popen:
        return subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    def signal_driver(self, number: int) -> int:
        """Send the driver a signal that ends it; returns its exit code."""
        self.driver.send_signal(number)
        return self.driver.wait()

    def processes(self) -> list[psutil.Process]:
        """All processes of the run."""
        return psutil.Process(self.driver.pid).children(recursive=True)

    def faults(self) -> list[Callable[[], None]]:
        return [] if self._alone else [self.kill_rank, self.stop_rank, self.kill_agent, self.damage]

    def kill_rank(self) -> None:
        """a rank is killed"""
        self._signal(self._ranks(), signal.SIGKILL)

    def stop_rank(self) -> None:
        """a rank is stopped, as in a hang"""
        self._signal(self._ranks(), signal.SIGSTOP)

    def kill_agent(self) -> None:
        """an agent with a rank is killed"""
        agents = {rank.ppid() for rank in self._ranks()}  # the run would not notice the death of a spare's agent
        self._signal([process for process in self.processes() if process.pid in agents], signal.SIGKILL)

    def damage(self) -> None:
        """the newest checkpoint is cut short and a rank is killed"""
        manifests = sorted((self.folder / "checkpoints").glob(f"{STEP_FOLDERS}/{MANIFEST}"))
        if len(manifests) > 1:
            with contextlib.suppress(FileNotFoundError):  # the run is removing this checkpoint
                victim = max(manifests[-1].parent.iterdir(), key=lambda path: path.stat().st_size)
                os.truncate(victim, victim.stat().st_size // 2)
        self.kill_rank()

    def fill_disk(self) -> None:
        """the disk of the checkpoints is full until a save has failed"""  # only where they have a disk of their own
        said = self._failed_saves()
        with full(self.folder / "checkpoints"):
            deadline = time.monotonic() + NOTICE_SECONDS
            while self._failed_saves() == said and time.monotonic() < deadline and self.driver.poll() is None:
                time.sleep(0.1)

    def _failed_saves(self) -> int:
        return (self.folder / "logs" / "rank_0.log").read_text(errors="replace").count("not written")

    def _ranks(self) -> list[psutil.Process]:
        """The processes of ranks, found by the log that each writes to. A reserve process has no log."""
        found = []
        for process in self.processes():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the process ended just now
                if Path(os.readlink(f"/proc/{process.pid}/fd/1")).name.startswith("rank_"):
                    found.append(process)
        return found

    def _signal(self, processes: list[psutil.Process], number: int) -> None:
        if processes:  # there is no rank while the run ends or restarts
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.chance.choice(processes).pid, number)

    def _await(self, kind: str, seen: int) -> None:
        """Wait until the run has written an event of this kind after its first `seen` events; at most
        NOTICE_SECONDS."""
        deadline = time.monotonic() + NOTICE_SECONDS
        while time.monotonic() < deadline and self.driver.poll() is None:
            if any(event["kind"] == kind for event in read_events(self.folder)[seen:]):
                return
            time.sleep(0.1)


class HostsGround(DrillGround):
    """Network namespaces as hosts, each with Ray. The first host runs the head and the driver, and meets no fault."""

    def __init__(self, folder: Path, chance: random.Random, hosts: Hosts, memory: Path):
        super().__init__(folder, chance)
        self.hosts, self._memory = hosts, memory
        self.overrides = (f"cluster.address={hosts.address}", f"checkpoint.memory_folder={memory}")

    def _start(self, words: list[str], log: IO[bytes]) -> subprocess.Popen:
        command = self.hosts.command(0, *words)
        return subprocess.Popen(command, env=self.hosts.environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    def processes(self) -> list[psutil.Process]:
        found = []
        for index in range(self.hosts.count):
            for pid in self.hosts.pids(index):
                with contextlib.suppress(psutil.NoSuchProcess):
                    found.append(psutil.Process(pid))
        return found

    def faults(self) -> list[Callable[[], None]]:
        links = [self.cut_link, self.cut_outgoing, self.cut_incoming]
        disks = [self.fill_disk, self.fill_temporary, self.start_without_disk]
        return [*super().faults(), self.power_off, *links, self.drain, self.set_clock, *disks]

    def power_off(self) -> None:
        """a host loses its power, and gets it back later"""
        index, seen = self._victim()
        self.hosts.power_off(index)
        for copies in self._memory.glob(f"*-h{index}"):
            shutil.rmtree(copies)
        self._await("recovered", seen)
        self.hosts.power_on(index)

    def cut_link(self) -> None:
        """the link of a host is cut, and heals later"""
        self._cut(self.hosts.cut)

    def cut_outgoing(self) -> None:
        """all that a host sends is lost, until it heals"""
        self._cut(partial(self.hosts.cut_one_way, outgoing=True))

    def cut_incoming(self) -> None:
        """all that is sent to a host is lost, until it heals"""
        self._cut(partial(self.hosts.cut_one_way, outgoing=False))

    def _cut(self, cut: Callable[[int], None]) -> None:
        index, seen = self._victim()
        cut(index)
        self._await("recovered", seen)
        self.hosts.heal(index)
        if not self._returned(index):  # Ray ends a node that comes back after it was listed as dead
            self._restart(index)

    def drain(self) -> None:
        """a host is told to leave, and comes back later"""
        index, seen = self._victim()
        self.hosts.leave(index).wait()
        self._await("first_step", seen)
        self._restart(index)

    def fill_temporary(self) -> None:
        """the disk of one host for temporary files is full, until a checkpoint is written"""
        index, seen = self._victim()
        with full(self.hosts.temporary(index)):
            self._await("disk", seen)
            self._await("checkpoint", len(read_events(self.folder)))

    def start_without_disk(self) -> None:
        """the disk of one host for temporary files is full, and a rank there is killed"""
        index, seen = self._victim()
        with full(self.hosts.temporary(index)):
            self._await("disk", seen)
            self._kill_rank_on(index)
            self._await("recovered", seen)

    def set_clock(self) -> None:
        """the clock of a host is set an hour ahead or back, and a rank there is killed; later the clock is right again"""
        index, seen = self._victim()
        self.hosts.set_clock(index, self.chance.choice([-3600, 3600]))
        try:
            self._await("clock", seen)
            self._kill_rank_on(index)
            self._await("recovered", seen)
        finally:
            self.hosts.set_clock(index, 0)

    def _kill_rank_on(self, index: int) -> None:
        there = self.hosts.pids(index)
        self._signal([rank for rank in self._ranks() if rank.pid in there], signal.SIGKILL)

    def _returned(self, index: int) -> bool:
        """Whether the run takes the host back within RETURN seconds, without a restart of the host's Ray."""
        seen, deadline = len(read_events(self.folder)), time.monotonic() + RETURN
        while time.monotonic() < deadline and self.hosts.pids(index, "/raylet/raylet"):
            news = read_events(self.folder)[seen:]
            if any(event["kind"] in ("node_back", "node_joined") and event["node"] == f"h{index}" for event in news):
                return True
            time.sleep(0.2)
        return False

    def _restart(self, index: int) -> None:
        self.hosts.signal(index, signal.SIGKILL)
        self.hosts.power_on(index)

    def _victim(self) -> tuple[int, int]:
        """Returns a host with ranks, except the first host, and the number of events so far."""
        events = read_events(self.folder)
        attempt = [event for event in events if event["kind"] == "attempt"][-1]
        index = self.chance.choice([int(name.removeprefix("h")) for name in attempt["nodes"] if name != "h0"])
        return index, len(events)


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """Fills the disk of this folder while the context is open."""
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        with contextlib.suppress(OSError):  # other processes take the last bytes meanwhile
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free)
        try:
            yield
        finally:
            ballast.unlink()


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """Mounts a disk of this size, in memory, at the folder."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
