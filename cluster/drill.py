"""Break a run on purpose, many times, and see whether it ends as if nothing had happened.

    python -m cluster.drill [--faults N] [--seed S] OVERRIDES...      overrides as for `python -m train`

Two runs of the recipe on a Ray of their own on this machine: one is left alone, the other meets N random faults: a rank
killed, a rank stopped (a hang), the agent killed, the driver asked to stop or killed and started again, the newest
checkpoint damaged and a rank killed. At the end the losses of every step of both runs are compared.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from cluster.journal import goodput, read_events
from conf.errors import EXIT_CRASH, EXIT_OK, EXIT_STOPPED, EXIT_USER, UserError
from conf.load import compose, report

DEFAULTS = ["cluster=ray", "cluster.hang_after=10", "cluster.restarts=5", "log.wandb=disabled", "log.sample_tokens=0"]
TOLERANCE = 1e-3
"""Relative difference of losses that passes. A restart with the same dp repeats sums in the same order; the bf16 products
of another dp round differently."""


class Drill:
    """One run under faults. `overrides` name the run and its folder; `say` prints a line."""

    def __init__(self, overrides: list[str], folder: Path, chance: random.Random, say: Callable[[str], None]):
        self._overrides, self._folder, self._chance, self._say = overrides, folder, chance, say
        self._driver: subprocess.Popen | None = None

    def run(self, faults: int) -> int:
        """Inject up to `faults` faults, one after another, each once the run works again; returns its exit code."""
        try:
            self._launch()
            for number in range(1, faults + 1):
                if not self._await_steps():
                    break
                fault = self._chance.choice(
                    [self._kill, self._hang, self._kill_agent, self._stop_driver, self._kill_driver, self._damage]
                )
                self._say(f"fault {number}/{faults}: {fault.__doc__}")
                fault()
            return self._driver.wait()
        finally:
            if self._driver.poll() is None:
                self._driver.kill()

    def _launch(self) -> None:
        log = (self._folder.parent / f"{self._folder.name}.log").open("ab")
        self._driver = subprocess.Popen(
            [sys.executable, "-m", "train", *self._overrides], stdout=log, stderr=subprocess.STDOUT
        )
        log.close()
        self._seen = len(read_events(self._folder))

    def _await_steps(self) -> bool:
        """Until the newest attempt has done a step and saved since, and a little longer; False if the run ended."""
        while self._driver.poll() is None:
            kinds = [event["kind"] for event in read_events(self._folder)[self._seen :]]
            if "first_step" in kinds and "checkpoint" in kinds[kinds.index("first_step") :]:
                time.sleep(self._chance.uniform(0, 1.5))
                self._seen += len(kinds)
                return self._driver.poll() is None
            time.sleep(0.1)
        return False

    def _processes(self) -> list[psutil.Process]:
        return psutil.Process(self._driver.pid).children(recursive=True)

    def _ranks(self) -> list[psutil.Process]:
        """Ranks by the log that they write to; a rank in reserve has none."""
        found = []
        for process in self._processes():
            try:
                if Path(os.readlink(f"/proc/{process.pid}/fd/1")).name.startswith("rank_"):
                    found.append(process)
            except (FileNotFoundError, ProcessLookupError):  # it ended just now
                continue
        return found

    def _signal(self, processes: list[psutil.Process], number: int) -> None:
        if processes:  # none while the run ends or starts again
            os.kill(self._chance.choice(processes).pid, number)

    def _kill(self) -> None:
        """a rank is killed"""
        self._signal(self._ranks(), signal.SIGKILL)

    def _hang(self) -> None:
        """a rank is stopped"""
        self._signal(self._ranks(), signal.SIGSTOP)

    def _kill_agent(self) -> None:
        """the agent is killed"""
        agents = [process for process in self._processes() if process.cmdline()[:1] == ["ray::Agent"]]
        self._signal(agents, signal.SIGKILL)

    def _stop_driver(self) -> None:
        """the driver gets SIGTERM and is started again"""
        self._driver.terminate()
        if self._driver.wait() == EXIT_STOPPED:
            self._launch()

    def _kill_driver(self) -> None:
        """the driver is killed and started again"""
        self._driver.kill()
        self._driver.wait()
        self._launch()

    def _damage(self) -> None:
        """the newest checkpoint is cut short and a rank is killed"""
        manifests = sorted((self._folder / "checkpoints").glob("step_*/manifest.json"))
        if len(manifests) > 1:
            victim = max(manifests[-1].parent.iterdir(), key=lambda path: path.stat().st_size)
            os.truncate(victim, victim.stat().st_size // 2)
        self._kill()


def losses(folder: Path) -> dict[int, float]:
    """Loss of every step in metrics.jsonl."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records}


def worst_difference(a: dict[int, float], b: dict[int, float]) -> tuple[int, float]:
    """Step with the largest relative difference, and that difference; infinite if the steps differ."""
    if a.keys() != b.keys():
        return min(a.keys() ^ b.keys()), float("inf")
    return max(((step, abs(a[step] - b[step]) / abs(a[step])) for step in a), key=lambda pair: pair[1])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.drill")
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options, overrides = parser.parse_known_args(arguments)
    overrides = [*DEFAULTS, *overrides]
    try:
        config = compose(*overrides)
        runs = Path(config.runs).absolute()
        folders = {kind: runs / f"{config.name}-{kind}" for kind in ("unbroken", "drill")}
        for folder in folders.values():
            if folder.exists():
                raise UserError("name", folder.name, f"{folder} exists", "remove it, or take another name=")
    except UserError as error:
        return report(error)
    runs.mkdir(parents=True, exist_ok=True)
    codes = {}
    for kind, faults in (("unbroken", 0), ("drill", options.faults)):
        started = time.monotonic()
        drill = Drill([*overrides, f"name={folders[kind].name}"], folders[kind], random.Random(options.seed), print)
        codes[kind] = drill.run(faults)
        print(f"{kind}: exit code {codes[kind]} after {time.monotonic() - started:.0f} s")
    if set(codes.values()) != {EXIT_OK}:
        print(f"error: a run did not end well; see {runs}/*.log", file=sys.stderr)
        return EXIT_USER if EXIT_USER in codes.values() else EXIT_CRASH
    return _compare(folders)


def _compare(folders: dict[str, Path]) -> int:
    events = read_events(folders["drill"])
    down = [event["seconds"] for event in events if event["kind"] == "recovered"]
    step, difference = worst_difference(losses(folders["unbroken"]), losses(folders["drill"]))
    record = goodput(events)
    print(f"{record.attempts} attempts; failures recovered from in {', '.join(f'{s:.1f}' for s in down) or 'no'} s")
    print(f"largest relative difference of a loss: {difference:.2g} at step {step} (limit {TOLERANCE:g})")
    return EXIT_OK if difference <= TOLERANCE else EXIT_CRASH


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
