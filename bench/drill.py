"""Break a run on purpose, many times, and check that it ends as if nothing had happened.

    python -m bench.drill [--faults N] [--every STEPS] [--only NAME] [--seed S] [--hosts N] OVERRIDES...

OVERRIDES as for `python -m train`. The recipe runs twice: one run is left alone. The other meets N faults, each after
the run has recovered from the previous one (and with --every after that many further steps). For each fault, the drill
prints the run's own report and the seconds until it.

    on this machine, with its own Ray   a rank killed or stopped (a hang), the agent killed, the driver told to stop, or
                                        killed and started again, the newest checkpoint damaged
    --hosts                             also: a host loses its power or its link, in one direction or both, and returns;
                                        a host is told to leave; its clock is set; its disk for temporary files, or the
                                        disk of the checkpoints, is full
    cluster=local                       only the driver is stopped or killed

With --hosts, the hosts are network namespaces (needs root); the first holds the driver and Ray's head. At the end the
drill compares the losses of every step of both runs, checks that no step was written twice, and reads every checkpoint.
One host more than the run needs (a spare) keeps dp, and so the losses, equal to the last bit.

Takes about two runs of the recipe.
"""

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median

from bench.drill_ground import DrillGround, HostsGround, small_disk
from bench.hosts import Hosts, missing
from cluster.driver.checkpoints import newest
from cluster.driver.journal import read_events
from cluster.driver.time_split import split_time
from cluster.driver.view import last_record
from cluster.run_files import NONE, Age
from conf.errors import EXIT_CRASH, EXIT_OK, EXIT_STOPPED, EXIT_USER, UserError
from conf.load import compose, reported
from conf.schema import ClusterBackend, Config
from conf.words import say

DEFAULTS = ["cluster=ray", "cluster.hang_after=10", "cluster.restarts=5", "log.wandb=disabled", "log.sample_tokens=0"]
TELLING = {
    "node_lost",
    "node_refused",
    "node_back",
    "node_joined",
    "clock",
    "disk",
    "failure",
    "drain",
    "idle",
    "attempt",
    "recovered",
}
"""Kinds of events that a drill prints after a fault."""
TOLERANCE = 1e-3
"""Largest relative difference of losses that passes. A restart with the same dp repeats all sums in the same order.
With another dp, bf16 matmuls round differently."""


class Drill:
    """One run under faults. `say` prints a line."""

    def __init__(
        self,
        overrides: list[str],
        ground: DrillGround,
        say: Callable[[str], None],
        only: str | None = None,
        every: int = 0,
    ):
        """only: names of the faults to inject, in order, separated by commas. every: minimum number of steps between
        two faults."""
        self._overrides, self._ground, self._say, self._only = [*overrides, *ground.overrides], ground, say, only
        self._every = every
        self.met: dict[str, list[float]] = {}
        """Seconds from each fault to the next checkpoint."""
        self._seen = Age(-1, -1)
        self._fault: tuple[str, float, int] | None = None
        """The last fault: its description, its time, and the number of the run's events at that time."""

    def run(self, faults: int) -> int:
        """Inject up to `faults` faults, one after another. The next fault comes after the run has recovered. Returns
        the exit code of the run."""
        ground = self._ground
        choices = [*ground.faults(), self.stop_driver, self.kill_driver]
        if self._only is not None:
            by_name = {fault.__name__: fault for fault in choices}
            if unknown := set(self._only.split(",")) - by_name.keys():
                raise UserError(
                    "--only", ", ".join(unknown), "no such fault here", f"take some of {', '.join(by_name)}"
                )
            choices = [by_name[name] for name in self._only.split(",")]
        try:
            self._launch()
            new_attempt = True
            for number in range(1, faults + 1):
                if not (self._await_steps(new_attempt) and self._await_step(number * self._every)):
                    break
                fault = choices[(number - 1) % len(choices)] if self._only else ground.chance.choice(choices)
                self._say(
                    f"{time.strftime('%H:%M:%S')} fault {number}/{faults} behind step {self._step()}: {fault.__doc__}"
                )
                self._fault = str(fault.__doc__), time.time(), len(read_events(ground.folder))
                fault()
                new_attempt = fault.__name__ not in ground.endured
            if faults and self._await_steps(new_attempt, pause=False):
                self._say("the run goes on to its end")
            return ground.driver.wait()
        finally:
            if ground.driver.poll() is None:
                ground.signal_driver(signal.SIGKILL)

    def _launch(self) -> None:
        self._ground.launch(self._overrides)

    def _await_steps(self, new_attempt: bool = True, pause: bool = True) -> bool:
        """Wait until the run has saved a checkpoint after the last fault, and a little longer. False if the run ended.
        new_attempt: whether an attempt that began after the fault must save it.
        """
        ground = self._ground
        while ground.driver.poll() is None:
            age = newest(ground.folder)
            if age > NONE and (age.attempt > self._seen.attempt if new_attempt else age > self._seen):
                if self._fault is not None:
                    self._tell_cost(*self._fault)
                if pause:
                    time.sleep(ground.chance.uniform(0, 1.5))
                self._seen = newest(ground.folder)
                return ground.driver.poll() is None
            time.sleep(0.1)
        return False

    def _await_step(self, step: int) -> bool:
        """Wait until this step is done. False if the run ended."""
        ground = self._ground
        while ground.driver.poll() is None and self._step() < step:
            time.sleep(0.05)
        return ground.driver.poll() is None

    def _step(self) -> int:
        return last_record(self._ground.folder / "metrics.jsonl").get("step", 0)

    def _tell_cost(self, fault: str, began: float, seen: int) -> None:
        """Print the run's events after the last fault, and the seconds until the next checkpoint."""
        self.met.setdefault(fault, []).append(time.time() - began)
        for event in read_events(self._ground.folder)[seen:]:
            if event["kind"] in TELLING:
                self._say(
                    f"  {event['time'] - began:6.1f} s {event['kind'].replace('_', ' ')}: {event['text'].splitlines()[0]}"
                )
        self._say(f"  {time.time() - began:6.1f} s checkpoint")

    def stop_driver(self) -> None:
        """the driver gets SIGTERM and is started again"""
        if self._ground.signal_driver(signal.SIGTERM) == EXIT_STOPPED:
            self._launch()

    def kill_driver(self) -> None:
        """the driver is killed and started again"""
        self._ground.signal_driver(signal.SIGKILL)
        self._launch()


def losses(folder: Path) -> dict[int, float]:
    """Loss of every step in metrics.jsonl."""
    return {record["step"]: record["loss"] for record in _records(folder)}


def repeated(folder: Path) -> list[int]:
    """Steps that metrics.jsonl has twice, or that follow a later step. This happens if two processes of rank 0 write at
    once."""
    steps = [record["step"] for record in _records(folder)]
    return [step for before, step in pairwise(steps) if step <= before]


def _records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def worst_difference(a: dict[int, float], b: dict[int, float]) -> tuple[int, float]:
    """The step with the largest relative difference, and this difference. The difference is infinite if the runs have
    different steps."""
    if a.keys() != b.keys():
        return min(a.keys() ^ b.keys()), float("inf")
    return max(((step, abs(a[step] - b[step]) / abs(a[step])) for step in a), key=lambda pair: pair[1])


@reported
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.drill", description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--only", help="faults to inject in this order, such as kill_driver,stop_rank")
    parser.add_argument("--every", type=int, default=0, help="steps from a fault to the next, at least")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of faults and victims")
    parser.add_argument("--hosts", type=int, default=0, help="network namespaces; 0 for this machine as it is")
    parser.add_argument("--devices", type=int, default=1, help="ranks that a host can hold")
    parser.add_argument("--disk", type=int, default=512, help="MiB for the checkpoints, with --hosts")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="largest relative difference of a loss")
    options, overrides = parser.parse_known_args(arguments)
    overrides = [*DEFAULTS, *overrides]
    config = compose(*overrides)
    folders = _folders(config)
    if options.hosts and (why := missing()):
        raise UserError("--hosts", options.hosts, why, "leave it out, or run as root with iproute2")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_CRASH))  # remove hosts and mounts before the exit
    codes = {}
    for kind, faults in (("unbroken", 0), ("drill", options.faults)):
        started = time.monotonic()
        with _ground(folders[kind], options, config) as ground:
            drill = Drill([*overrides, f"name={folders[kind].name}"], ground, say, options.only, options.every)
            codes[kind] = drill.run(faults) or _verify(folders[kind])
        say(f"{kind}: exit code {codes[kind]} after {time.monotonic() - started:.0f} s")
    if set(codes.values()) != {EXIT_OK}:
        say(f"error: a run did not end well; see {folders['drill'].parent}/*.log", file=sys.stderr)
        return EXIT_USER if EXIT_USER in codes.values() else EXIT_CRASH
    return _compare(folders, drill, options)


def _folders(config: Config) -> dict[str, Path]:
    """Folders of the two runs. Raises UserError if one of them already exists."""
    runs = Path(config.runs).absolute()
    folders = {kind: runs / f"{config.name}-{kind}" for kind in ("unbroken", "drill")}
    for folder in folders.values():
        if folder.exists():
            raise UserError("name", folder.name, f"{folder} exists", "remove it, or take another name=")
    runs.mkdir(parents=True, exist_ok=True)
    return folders


@contextlib.contextmanager
def _ground(folder: Path, options: argparse.Namespace, config: Config) -> Iterator[DrillGround]:
    chance = random.Random(options.seed)
    if not options.hosts:
        yield DrillGround(folder, chance, alone=config.cluster.backend is ClusterBackend.local)
        return
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(small_disk(folder / "checkpoints", options.disk))
        (scratch / "memory").mkdir()
        hosts = stack.enter_context(Hosts(scratch, options.hosts, options.devices, clocks=True))
        yield HostsGround(folder, chance, hosts, scratch / "memory")


def _verify(folder: Path) -> int:
    """Check the checksums of every checkpoint. Returns EXIT_CRASH if a checkpoint is damaged."""
    words = [sys.executable, "-m", "train.checkpoint.verify", str(folder)]
    return subprocess.run(words, stdout=subprocess.DEVNULL).returncode


def _compare(folders: dict[str, Path], drill: Drill, options: argparse.Namespace) -> int:
    events = read_events(folders["drill"])
    down = [event["seconds"] for event in events if event["kind"] == "recovered"]
    step, difference = worst_difference(losses(folders["unbroken"]), losses(folders["drill"]))
    record = split_time(events)
    for fault, seconds in drill.met.items():
        cost = f"the next checkpoint after {median(seconds):.1f} s in the median, at most {max(seconds):.1f} s"
        say(f"{len(seconds):4} x {fault}: {cost}")
    if events:
        say(f"{record.attempts} attempts; failures recovered from in {', '.join(f'{s:.1f}' for s in down) or 'no'} s")
    say(f"largest relative difference of a loss: {difference:.2g} at step {step} (limit {options.tolerance:g})")
    if twice := repeated(folders["drill"]):
        say(f"error: metrics.jsonl has steps {twice[:8]} twice, or out of order", file=sys.stderr)
        return EXIT_CRASH
    met = sum(map(len, drill.met.values()))
    if met < options.faults:
        say(f"error: the run ended after {met} of {options.faults} faults; raise steps=", file=sys.stderr)
        return EXIT_CRASH
    return EXIT_OK if difference <= options.tolerance else EXIT_CRASH


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
