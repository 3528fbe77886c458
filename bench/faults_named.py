"""Small faults in training ranks: does the run name the right rank and the right cause, and after how many seconds?

    python -m bench.faults_named [--only NAME ...] [--limit 90] [--address HOST:PORT] [--out faults_named.json]

A hook of this benchmark (bench/fault_hooks.py) injects the fault into a tiny model that trains on this machine, in
pipelines, with experts over ranks, with shared sequences and with replicas. Ranks run under the driver of one machine
(`local`), as torchrun starts them (`torchrun`), or on their own Ray on this machine (`ray`).

The benchmark judges logs/incident_N.json: it must name all culprits and no other rank, and a cause that is right for
the fault. A wrong rank is a failure, and so is *unknown*. A hanging run ends for this benchmark as soon as a warning
names a rank. Seconds count from the fault to the incident, or to the event of a slow rank.

Faults of links need root and TUN devices (bench/fault_links.py), because kernels without netem have no other means; the
memory fault needs root and control groups of version 1. Without these, the fault does not happen, which counts as not
named. A clock that is an hour off is not named, and must not mislead.

To test another trainer: take bench/fault_hooks.py, which needs only torch except for `in_loader` and `Saboteur`, and
call a fault of its table in a rank between two steps.

Takes about 25 minutes.
"""

import argparse
import json
import multiprocessing
import os
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from bench.fault_hooks import GROUP_PREFIX, MEMORY_GROUPS
from bench.fault_links import DEVICE, LINKS, NETWORK, LinkedHosts
from cluster.driver.journal import read_events
from cluster.incident import newest_incident
from cluster.local import run_children
from cluster.patience import patience_of
from cluster.place import Place
from cluster.spawn import ForkedProcess
from conf.errors import EXIT_OK
from conf.load import compose, write_config
from conf.schema import Config
from conf.words import say

LAYOUTS = {
    "dp2": ("parallel.dp=2",),
    "dp4": ("parallel.dp=4",),
    "pp2dp2": ("parallel.pp=2", "parallel.dp=2"),
    "ep2": ("parallel.dp=2", "parallel.ep=2"),
    "ep2_zero3": ("parallel.dp=2", "parallel.ep=2", "parallel.zero=3"),
    "cp2": ("parallel.cp=2",),
    "pp2": ("parallel.pp=2",),
}


HARMLESS = ("clock_ahead", "clock_behind", "periodic")
"""Faults that delay no other rank."""


class FaultCase(NamedTuple):
    """One trial."""

    layout: str
    faults: dict[int, str]
    """For each faulty rank, a fault of bench/fault_hooks.py."""
    right: tuple[str, ...]
    """Faults or kinds of causes that count as the right answer."""
    words: str = ""
    """Text that the incident's sentence must contain."""
    launcher: str = "local"
    settings: tuple[str, ...] = ()
    """Additional settings of the recipe."""

    @property
    def culprits(self) -> list[int]:
        """The ranks that the run must name. A harmless fault, such as a wrong clock, has no culprit."""
        return sorted(rank for rank, fault in self.faults.items() if fault not in HARMLESS)

    @property
    def name(self) -> str:
        return f"{self.layout}:{'+'.join(self.faults.values())}:{self.launcher}"


HANGS = ("absent",)
CASES = (
    FaultCase("dp2", {1: "loader_sleep"}, ("loader",)),
    FaultCase("dp4", {2: "loader_pipe"}, ("loader",)),
    FaultCase("dp4", {3: "sleep_before"}, HANGS),
    FaultCase("pp2dp2", {2: "sleep_before"}, HANGS),
    FaultCase("ep2", {1: "sleep_before_exchange"}, HANGS),
    FaultCase("pp2dp2", {0: "sleep_in_forward"}, HANGS),
    FaultCase("pp2dp2", {3: "sleep_in_backward"}, HANGS),
    FaultCase("cp2", {1: "sleep_in_forward"}, HANGS),
    FaultCase("dp4", {1: "lock"}, ("lock",)),
    FaultCase("pp2", {1: "join"}, ("lock",)),
    FaultCase("ep2", {0: "event"}, ("lock",)),
    FaultCase("dp2", {0: "pipe"}, HANGS),
    FaultCase("dp2", {1: "process"}, ("lock", "absent")),
    FaultCase("dp2", {1: "loop"}, HANGS),
    FaultCase("dp2", {1: "loop_in_c"}, HANGS),
    FaultCase("dp2", {1: "skip"}, ("skipped",)),
    FaultCase("dp4", {2: "skip"}, ("skipped",)),
    FaultCase("dp4", {0: "skip_later"}, ("skipped",)),
    FaultCase("pp2dp2", {1: "skip"}, ("skipped",)),
    FaultCase("ep2", {1: "skip_exchange"}, ("skipped",)),
    FaultCase("cp2", {1: "skip_gather"}, ("skipped",)),
    FaultCase("ep2_zero3", {0: "skip"}, ("skipped",)),
    FaultCase("dp2", {0: "repeat"}, ("repeated",)),
    FaultCase("dp4", {3: "repeat"}, ("repeated",)),
    FaultCase("dp2", {1: "swap"}, ("reordered", "skipped")),
    FaultCase("pp2dp2", {2: "swap"}, ("reordered", "skipped")),
    FaultCase("dp2", {1: "size"}, ("resized",)),
    FaultCase("dp4", {0: "size"}, ("resized",)),
    FaultCase("dp2", {0: "type"}, ("retyped",)),
    FaultCase("dp4", {1: "type_of_half"}, ("retyped",)),
    FaultCase("dp4", {2: "other"}, ("other",)),
    FaultCase("dp2", {1: "stop"}, ("stopped",)),
    FaultCase("pp2dp2", {2: "stop"}, ("stopped",)),
    FaultCase("ep2", {0: "stop"}, ("stopped",)),
    FaultCase("dp4", {1: "killed"}, ("kind:killed",), "SIGKILL"),
    FaultCase("pp2dp2", {3: "killed"}, ("kind:killed",), "SIGKILL"),
    FaultCase("dp2", {1: "loader_killed"}, ("kind:killed",), "SIGKILL"),
    FaultCase("dp2", {0: "segfault"}, ("kind:killed",), "SIGSEGV"),
    FaultCase("dp4", {2: "abort"}, ("kind:killed",), "SIGABRT"),
    FaultCase("dp2", {1: "exit_0"}, ("kind:killed",), "exit code 0"),
    FaultCase("pp2", {0: "exit_2"}, ("kind:killed",), "exit code 2"),
    FaultCase("dp4", {1: "exit_3"}, ("kind:killed",), "exit code 3"),
    FaultCase("cp2", {0: "exit_75"}, ("kind:killed",), "exit code 75"),
    FaultCase("dp4", {1: "exit_7"}, ("kind:killed",), "exit code 7"),
    FaultCase("dp2", {1: "bus_error"}, ("kind:killed",), "SIGBUS"),
    FaultCase("dp4", {2: "illegal"}, ("kind:killed",), "SIGILL"),
    FaultCase("pp2", {1: "terminated"}, ("kind:killed",), "SIGTERM"),
    FaultCase("dp4", {2: "interrupt"}, ("kind:crash",), "KeyboardInterrupt"),
    FaultCase("dp2", {1: "sys_exit"}, ("kind:crash",), "SystemExit"),
    FaultCase("ep2", {1: "error"}, ("kind:crash",), "an error of the user's code"),
    FaultCase("pp2dp2", {1: "error_in_backward"}, ("kind:crash",), "an error of the user's code"),
    FaultCase("dp2", {0: "loader_error"}, ("kind:crash",), "an error of the user's code"),
    FaultCase("dp2", {1: "helper_exits"}, ("kind:killed",), "exit code 1"),
    FaultCase("dp4", {2: "nan_output"}, ("kind:diverged",)),
    FaultCase("pp2dp2", {3: "inf_gradient"}, ("kind:diverged",)),
    FaultCase("dp4", {2: "flip"}, ("kind:crash",), "holds other weights"),
    FaultCase("dp2", {1: "flip_master"}, ("kind:crash",), "master."),
    FaultCase("pp2dp2", {2: "flip_moment"}, ("kind:crash",), "exp_avg_sq."),
    FaultCase("ep2", {0: "nan_weight"}, ("kind:crash",), "holds other weights"),
    FaultCase("cp2", {1: "loop"}, HANGS),
    FaultCase("pp2dp2", {1: "loader_pipe"}, ("loader",)),
    FaultCase("ep2", {1: "size"}, ("resized",)),
    FaultCase("dp4", {1: "swap", 2: "swap"}, ("reordered", "skipped")),
    FaultCase("pp2", {0: "send_left_out"}, ("skipped", "unsent")),
    FaultCase("pp2", {1: "receive_left_out"}, ("skipped",)),
    FaultCase("pp2dp2", {0: "send_of_half"}, ("resized",)),
    FaultCase("dp4", {1: "stop", 3: "sleep_before"}, ("stopped",)),
    FaultCase("dp4", {0: "loader_sleep", 2: "loader_sleep"}, ("loader",)),
    FaultCase("dp4", {1: "killed", 2: "killed"}, ("kind:killed",)),
    FaultCase("dp4", {0: "loop", 3: "event"}, ("absent", "lock")),
    FaultCase("dp4", {1: "sleep_in_forward", 2: "lock"}, ("absent", "lock")),
    FaultCase("dp2", {1: "out_of_memory"}, ("kind:killed",), "out of memory"),
    FaultCase("pp2dp2", {0: "disk_slow"}, ("loader",)),
    FaultCase(
        "dp2",
        {1: "disk_dead"},
        ("kind:crash",),
        "a disk that does not answer",
        settings=("checkpoint.every=10", "cluster.timeout=5"),
    ),
    FaultCase(
        "dp2",
        {1: "disk_refuses"},
        ("kind:crash",),
        "Input/output error",
        settings=("checkpoint.every=10", "cluster.timeout=20"),
    ),
    FaultCase("dp4", {2: "clock_error"}, ("kind:crash",), "an error of the user's code"),
    FaultCase("dp4", {0: "periodic", 1: "periodic", 2: "periodic_left_out", 3: "periodic"}, ("skipped",)),
    FaultCase("dp2", {0: "periodic", 1: "periodic_left_out"}, ("skipped",)),
    FaultCase("dp4", {2: "version"}, ("repeated", "other", "retyped")),
    FaultCase("dp4", {1: "clock_ahead", 2: "skip"}, ("skipped",)),
    FaultCase("pp2dp2", {0: "clock_behind", 3: "sleep_before"}, HANGS),
    FaultCase("dp4", {2: "link_cut"}, ("link",)),
    FaultCase("pp2dp2", {1: "link_cut"}, ("link",)),
    FaultCase("dp4", {0: "link_lossy"}, ("link",)),
    FaultCase("dp4", {3: "link_slow"}, ("link",)),
    FaultCase("dp4", {2: "link_cut"}, ("link",), launcher="torchrun"),
    FaultCase("dp2", {1: "loader_sleep"}, ("loader",), launcher="torchrun"),
    FaultCase("pp2dp2", {2: "stop"}, ("stopped",), launcher="torchrun"),
    FaultCase("dp4", {2: "skip"}, ("skipped",), launcher="torchrun"),
    FaultCase("dp2", {1: "killed"}, ("kind:killed",), launcher="torchrun"),
    FaultCase("ep2", {1: "error"}, ("kind:crash",), "an error of the user's code", launcher="torchrun"),
    FaultCase("dp2", {1: "loader_sleep"}, ("loader",), launcher="ray"),
    FaultCase("pp2dp2", {2: "sleep_before"}, HANGS, launcher="ray"),
    FaultCase("dp2", {0: "lock"}, ("lock",), launcher="ray"),
    FaultCase("dp2", {1: "skip"}, ("skipped",), launcher="ray"),
    FaultCase("dp2", {1: "size"}, ("resized",), launcher="ray"),
    FaultCase("dp2", {1: "stop"}, ("stopped",), launcher="ray"),
    FaultCase("pp2dp2", {3: "killed"}, ("kind:killed",), "SIGKILL", launcher="ray"),
    FaultCase("ep2", {0: "error"}, ("kind:crash",), "an error of the user's code", launcher="ray"),
    FaultCase("dp2", {1: "flip_master"}, ("kind:crash",), "master.", launcher="ray"),
    FaultCase("dp2", {1: "slow"}, ("kind:straggler",), launcher="ray", settings=("steps=120",)),
)


class Judged(NamedTuple):
    """The result of a trial."""

    case: str
    rank: bool
    """Whether the run named all culprits and no other rank."""
    cause: bool
    seconds: float | None
    said: str
    """What the run named, as text."""


def run_case(case: FaultCase, folder: Path, limit: float, address: str | None = None) -> Judged:
    """Run one trial. folder: for corpus, cache and runs. address: a running Ray for the launcher `ray`; None: the trial
    starts its own Ray."""
    config = _config(case, folder, address)
    run = Path(config.runs) / config.name
    (run / "logs").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints").mkdir(exist_ok=True)
    write_config(config, str(run / "config.yaml"))
    started = time.time()
    driver = multiprocessing.get_context("fork").Process(target=drive, args=(case, config, run))
    driver.start()
    while driver.is_alive() and time.time() < started + limit and not _is_named(case, run, started):
        driver.join(0.1)
    if driver.is_alive():
        os.kill(driver.pid or 0, signal.SIGKILL)  # the ranks die with the driver
        driver.join()
    for group in MEMORY_GROUPS.glob(f"{GROUP_PREFIX}*"):
        with suppress(OSError):  # a process of this group is still alive
            group.rmdir()
    return judge_case(case, run, started)


def _is_named(case: FaultCase, run: Path, started: float) -> bool:
    """Whether a warning already names the blocking rank; the run itself would end much later. A run on Ray ends by
    itself."""
    found = newest_incident(run / "logs")
    return case.launcher != "ray" and found is not None and found[1]["time"] > started and found[1]["kind"] == "hang"


def judge_case(case: FaultCase, run: Path, started: float) -> Judged:
    """Compare the run's incident with the injected fault."""
    struck = [float(path.read_text()) for path in run.glob("struck_*")]
    found = newest_incident(run / "logs")
    if not struck:
        return Judged(case.name, False, False, None, "the fault did not come to pass")
    if found is None and (
        slow := [event for event in read_events(run) if event["kind"] == "straggler"]
    ):  # a slow rank leaves no incident
        found = run, slow[0] | {"ranks": sorted({event["rank"] for event in slow}), "fault": "slow"}
    if found is None or found[1]["time"] < started:
        return Judged(case.name, False, False, None, "no incident")
    incident = found[1]
    rank = sorted(incident["ranks"]) == case.culprits
    fits = incident["fault"] in case.right or f"kind:{incident['kind']}" in case.right
    said = (
        f"ranks {incident['ranks']} {incident['fault']} ({incident['kind']}): {incident['text'].partition(chr(10))[0]}"
    )
    cause = rank and fits and case.words in incident["text"]
    return Judged(case.name, rank, cause, incident["time"] - max(struck), said)


def _config(case: FaultCase, folder: Path, address: str | None) -> Config:
    from tests.small import arguments

    name = case.name.replace(":", "_").replace("+", "_")
    faults = ", ".join(f"{rank}: {fault}" for rank, fault in case.faults.items())
    settings = [
        f"name={name}", *LAYOUTS[case.layout], "steps=40", "checkpoint.every=0", "log.validate_every=0", "log.progress=false",
        "log.sample_tokens=0", "optim.max_bad_steps=2", f"log.replicas_every={int(case.layout != 'ep2_zero3')}", "log.state_every=1", "cluster.deterministic=true", f"callbacks=[{{_target_: bench.fault_hooks.Saboteur, faults: {{{faults}}}}}]", "cluster.timeout=60", "cluster.kill_after=10", *case.settings,
    ]  # fmt: skip
    if case.launcher == "ray":
        settings += [
            "cluster=ray",
            "cluster.restarts=0",
            "cluster.hang_after=20",
            f"cluster.address={address or 'null'}",
        ]
    return compose(*arguments(folder, *settings))


def drive(case: FaultCase, config: Config, run: Path) -> None:
    """Start the ranks as the launcher does, and wait for their end. Runs in a separate process."""
    with (run / "driver.log").open("wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    world, logs, work = config.parallel.world, run / "logs", partial(_work, config)
    if any(fault in LINKS for fault in case.faults.values()):
        work = partial(_work_on_host, LinkedHosts(world, case.faults, run), config)
        os.environ["GLOO_SOCKET_IFNAME"] = DEVICE
    if case.launcher == "ray":
        from cluster.driver.ray_backend import run_ray

        sys.exit(run_ray(config, run, [sys.executable, "-m", "train.worker", "CONFIG"]))
    if case.launcher == "local":
        start: Callable = lambda environment, output: ForkedProcess(  # noqa: E731
            partial(work, world, logs, environment), environment, output
        )
        sys.exit(run_children(start, world, logs, patience_of(config.cluster)))
    _drive_like_torchrun(work, world, run)


def _work_on_host(
    hosts: LinkedHosts, config: Config, world: int, logs: Path | None, environment: dict[str, str]
) -> int:
    hosts.enter(int(environment["RANK"]))
    return _work(config, world, logs, environment)


def _work(config: Config, world: int, logs: Path | None, environment: dict[str, str]) -> int:
    """Runs one rank in its own process."""
    from train.worker import run_rank

    rank = int(environment["RANK"])
    return run_rank(config, Place(rank, world, rank, world), logs)


def _drive_like_torchrun(work: Callable, world: int, run: Path) -> None:
    """Runs the ranks without a driver. They meet at rank 0, and the first failure ends all ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks, shared = (
        [],
        {
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
        },
    )
    if os.environ.get("GLOO_SOCKET_IFNAME") == DEVICE:
        shared |= {"MASTER_ADDR": f"{NETWORK}.1", "GLOO_SOCKET_IFNAME": DEVICE}  # fmt: skip
    for rank in range(world):
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        output: IO = (run / f"rank_{rank}.out").open("wb")
        ranks.append(ForkedProcess(partial(work, world, None, environment), environment, output))
    while all(rank.poll() is None for rank in ranks) or all(rank.poll() in (None, EXIT_OK) for rank in ranks):
        if all(rank.poll() == EXIT_OK for rank in ranks):
            sys.exit(EXIT_OK)
        time.sleep(0.05)
        if any(rank.poll() not in (None, EXIT_OK) for rank in ranks):
            time.sleep(3.0)  # torchrun gives the other ranks up to 30 s after SIGTERM
            break
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
    sys.exit(1)


def show_judged(judged: Sequence[Judged]) -> None:
    """Prints a table of the results, and a summary."""
    for one in judged:
        seconds = f"{one.seconds:5.1f} s" if one.seconds is not None else "      -"
        say(
            f"{one.case:40} rank {'yes' if one.rank else 'NO ':3} cause {'yes' if one.cause else 'NO ':3} {seconds}  {one.said[:150]}"
        )
    times = [one.seconds for one in judged if one.rank and one.seconds is not None]
    median = f"{statistics.median(times):.1f} s" if times else "-"
    named, right = sum(one.rank for one in judged), sum(one.cause for one in judged)
    say(f"of {len(judged)}: right rank {named}, right cause {right}, median of those {median}")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="parts of names of cases")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds of a case")
    parser.add_argument("--address", help="of a Ray for the cases of `ray`; without one each starts its own")
    parser.add_argument("--out", type=Path, default=Path("faults_named.json"))
    given = parser.parse_args(words)
    import_ahead()
    judged: list[Judged] = []
    with tempfile.TemporaryDirectory(prefix="faults-named-") as scratch:
        for case in CASES:
            if given.only and not any(part in case.name for part in given.only):
                continue
            judged.append(run_case(case, Path(scratch), given.limit, given.address))
            show_judged(judged[-1:])
            given.out.write_text(json.dumps([one._asdict() for one in judged], indent=1))
    show_judged(judged)
    return EXIT_OK


def import_ahead() -> None:
    """Imports once what the ranks need. The ranks are forks of this process, which itself computes nothing."""
    from parallel.zero.deepspeed_patches import import_deepspeed
    from train import worker  # noqa: F401

    import_deepspeed(on_cuda=False)


if __name__ == "__main__":
    sys.exit(main())
