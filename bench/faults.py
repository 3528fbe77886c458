"""Time to notice a fault and to train again: Sluice beside Ray Train and torchrun, on three simulated hosts.

    python -m bench.faults [--only SYSTEM:FAULT ...] [--rounds 3] [--minutes 18] [--limit 120] [--out faults.json]

The hosts are network namespaces. Needs root and iproute2. Every trial is a separate launch: it trains for 20 s and then
until half-way between two checkpoints, h1 meets the fault, and the trial ends with the next step, or after --limit
seconds. (In the first seconds Sluice still prepares its reserve processes for a restart, and few real faults occur
then.)

Rounds over all cells follow one another, so that machine noise affects all. A cell that did not recover is not tried
again. A round that would not end within --minutes is not started; untried cells are named. Everything started or
created is ended and removed, also after errors.

    rank_kill   SIGKILL of the rank on h1                  hang         SIGSTOP of the rank on h1
    power_off   link down, then all processes of h1 killed link_cut     link down, processes live
    start       no fault: launch to first step on 3 hosts  start_local  the same, 3 ranks on one machine

SYSTEM is one of bench/fault_systems.py. On one machine Sluice and Ray Train start their own Ray; on 3 hosts it already
runs. Sluice's detection time ends when it has named the cause, after asking all nodes; for the others it ends at their
first sign of the failure, so the fair comparison is the next step.

Columns: seconds from the launch to the first step (over all trials of the cell), from the fault to the system's report,
and to the next step; repeated steps. Medians over the trials; a system that never reports gets a dash.

Takes about 18 minutes.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.fault_loop import SAVE_EVERY
from bench.fault_systems import ENVIRONMENT, HOSTS, PYTHON, SYSTEMS, TIMEOUT, System
from bench.hosts import Hosts, missing
from conf.schema import ROOT

VICTIM = 1
"""Number of the host that meets the fault. The drivers run on h0."""
NODE_FAULTS = ("power_off", "link_cut")
FAULTS = ("rank_kill", "power_off", "link_cut", "hang")
KINDS = (*FAULTS, "start", "start_local")
SETTLED = 20.0
"""Minimum seconds from the first step to the fault."""


class Launch:
    """The processes of one trial. Use it in `with`."""

    def __init__(self, system: System, hosts: Hosts, local: bool):
        self.system, self._hosts = system, hosts
        self.folder = Path(tempfile.mkdtemp(prefix="t", dir=hosts.folder))
        self.log = system.log(self.folder)
        self.started = time.time()
        commands = system.commands(self.folder, None if local else hosts.address)
        self._processes = {host: self._start(host, words) for host, words in commands.items()}

    def _start(self, host: int, words: list[str]) -> subprocess.Popen:
        with (self.folder / f"output_{host}.log").open("a") as output:
            return subprocess.Popen(
                self._hosts.command(host, PYTHON, *words),
                cwd=ROOT,
                env=self._hosts.environment | ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait(self, what: Callable[[], object], deadline: float) -> object:
        """Calls `what` until its value is true, and returns this value. None if the deadline (Unix time) has passed or
        the command on h0 has ended."""
        while time.time() < deadline:
            if value := what():
                return value
            if self.ended() is not None:
                return None
            time.sleep(0.05)
        return None

    def ended(self) -> int | None:
        """Exit code of the command on h0; None while it runs."""
        return self._processes[0].poll()

    def output(self) -> str:
        return (self.folder / "output_0.log").read_text()

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()
        for host in range(HOSTS):
            if self._hosts.ray:
                ours = self.log.pids() & set(self._hosts.pids(host))
                for pid in ours:
                    with contextlib.suppress(ProcessLookupError):  # the process ended just now
                        os.kill(pid, signal.SIGKILL)
            else:
                self._hosts.signal(host, signal.SIGKILL)
        if self._hosts.ray and self.system.clean:
            self._start(0, self.system.clean(self._hosts.address)).wait(60)


def trial(system: System, kind: str, hosts: Hosts, limit: float) -> dict:
    """Runs one launch and returns its result. The module docstring lists the values of `kind`."""
    with Launch(system, hosts, local=kind == "start_local") as launch:
        result = {"outcome": "", "start": None, "detected": None, "next_step": None, "steps_lost": None}
        first = launch.wait(launch.log.first_step, launch.started + limit)
        if first is None:
            return result | _end(launch, "no step", limit)
        result |= {"start": first - launch.started, "outcome": "started"}
        if kind in FAULTS:
            result |= _break(launch, kind, hosts, limit)
    if kind in NODE_FAULTS:
        hosts.signal(VICTIM, signal.SIGKILL)
        hosts.power_on(VICTIM)
    return result | {"load": os.getloadavg()[0]}


def _break(launch: Launch, fault: str, hosts: Hosts, limit: float) -> dict:
    first = launch.log.first_step()

    def settled() -> bool:
        step = launch.log.step()
        return time.time() > first + SETTLED and step > SAVE_EVERY and step % SAVE_EVERY >= SAVE_EVERY // 2

    if not launch.wait(settled, time.time() + limit):
        return _end(launch, "no checkpoint", limit)
    match fault:
        case "rank_kill":
            os.kill(launch.log.victim(f"h{VICTIM}", hosts), signal.SIGKILL)
        case "hang":
            os.kill(launch.log.victim(f"h{VICTIM}", hosts), signal.SIGSTOP)
        case "power_off":
            hosts.power_off(VICTIM)
        case "link_cut":
            hosts.cut(VICTIM)
    broke = time.time()
    found = launch.wait(lambda: launch.log.next_step(broke), broke + limit)
    detected = launch.system.detected(launch.folder, broke)
    seen = {"detected": None if detected is None else detected - broke}
    if found is None:
        return seen | _end(launch, "not recovered", limit)
    return seen | {"next_step": found[0] - broke, "steps_lost": found[1], "outcome": "recovered"}


def _end(launch: Launch, what: str, limit: float) -> dict:
    code = launch.ended()
    outcome = f"{what} in {limit:.0f} s" if code is None else f"failed: exit code {code}"
    return {"outcome": outcome, "said": launch.output()[-1000:]}


def run_round(
    cells: list[tuple[str, str]], limit: float, deadline: float, keep: Callable[[str, str, dict], None]
) -> None:
    """Runs one trial of every cell: first the cells that need Ray on the hosts, then the others, on hosts without Ray.
    No trial begins after the deadline (monotonic clock)."""
    for ray in (True, False):
        mine = [(name, kind) for name, kind in cells if (SYSTEMS[name].on_ray and kind != "start_local") == ray]
        if not mine or time.monotonic() > deadline:
            continue
        folder = Path(tempfile.mkdtemp(prefix="slf"))
        try:
            hosts = Hosts(folder, HOSTS, ray=ray)
            hosts.environment |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "RAY_TMPDIR": str(folder)}
            with hosts:
                for name, kind in mine:
                    if time.monotonic() > deadline:
                        break
                    keep(name, kind, trial(SYSTEMS[name], kind, hosts, limit))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def summary(trials: list[dict]) -> dict:
    """Medians of each figure over the trials that have it, and how the trials ended."""
    median = {}
    for key in ("start", "detected", "next_step", "steps_lost"):
        values = [one[key] for one in trials if one.get(key) is not None]
        median[key] = round(statistics.median(values), 2) if values else None
    outcomes = [one["outcome"] for one in trials]
    return median | {"outcomes": {text: outcomes.count(text) for text in dict.fromkeys(outcomes)}, "trials": trials}


def show(results: dict[tuple[str, str], list[dict]]) -> None:
    print(f"\n{'fault':12}{'system':14}{'start s':>9}{'detected s':>12}{'next step s':>13}{'lost':>6}  outcome")
    for kind in KINDS:
        for name in SYSTEMS:
            if (name, kind) in results:
                row = summary(results[name, kind])
                cells = ["-" if row[key] is None else f"{row[key]:.1f}" for key in ("start", "detected", "next_step")]
                lost = "-" if row["steps_lost"] is None else f"{row['steps_lost']:.0f}"
                outcome = ", ".join(f"{count} {text}" for text, count in row["outcomes"].items())
                print(f"{kind:12}{name:14}{cells[0]:>9}{cells[1]:>12}{cells[2]:>13}{lost:>6}  {outcome}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [f"{name}:{kind}" for name in SYSTEMS for kind in KINDS]
    parser.add_argument("--only", nargs="+", choices=every, default=every, metavar="SYSTEM:FAULT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--minutes", type=float, default=18.0, help="no round begins that would end later, and no trial after them"
    )
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for a start, and for a recovery")
    parser.add_argument("--out", type=Path, default=Path("faults.json"))
    options = parser.parse_args()
    if why := missing():
        parser.error(why)
    signal.signal(signal.SIGTERM, lambda *_: parser.exit(143))  # so that SIGTERM removes the hosts too
    results: dict[tuple[str, str], list[dict]] = {}

    def keep(name: str, kind: str, result: dict) -> None:
        results.setdefault((name, kind), []).append(result)
        print(
            f"{name}:{kind} {json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in result.items()})}",
            flush=True,
        )
        _write(options.out, results)

    began = time.monotonic()
    asked = cells = [tuple(cell.split(":")) for cell in options.only]
    for number in range(1, options.rounds + 1):
        run_round(cells, options.limit, began + options.minutes * 60, keep)
        cells = [cell for cell in cells if cell in results and results[cell][-1]["outcome"] in ("recovered", "started")]
        elapsed = time.monotonic() - began
        if elapsed * (number + 1) / number > options.minutes * 60:
            break
    show(results)
    if left := [":".join(cell) for cell in asked if cell not in results]:
        print(f"not tried within {options.minutes:g} minutes: {', '.join(left)}")


def _write(path: Path, results: dict[tuple[str, str], list[dict]]) -> None:
    cells: dict[str, dict] = {}
    for (name, kind), trials in results.items():
        cells.setdefault(kind, {})[name] = summary(trials)
    machine = {"cores": os.cpu_count(), "hosts": HOSTS, "hang_limit": TIMEOUT}
    path.write_text(json.dumps({"machine": machine, "cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()
