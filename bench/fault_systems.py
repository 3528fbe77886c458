"""The systems that bench/faults.py breaks: how each is started on its hosts, and where it writes its events.

    sluice, sluice_plain    Sluice on Ray: its own trainer on a toy model, and the plain loop (bench/fault_loop.py)
    ray_train               Ray Train, elastic from 2 to 3 workers, plain loop
    torchrun                torchrun, elastic from 2 to 3 nodes, c10d rendezvous on h0, plain loop

All have the same time limits, which are more favourable to the peers than their defaults: TIMEOUT for a hang (of a
collective, which is all that the peers watch; their default is 30 min), 3 s without a sign of life for a lost node, at
most 5 s for a late node.
"""

import datetime
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.fault_drivers import FAILURES
from bench.hosts import NETWORK, Hosts
from cluster.driver.journal import read_events
from cluster.driver.view import last_record

TIMEOUT = 10
"""Seconds without a step, or in one collective, after which a system may report a hang."""
HOSTS = 3
TOY = [
    "conf=tiny", "model.hidden=32", "model.layers=2", "model.experts=8", "model.vocab_size=512", "seq_len=32",
    "log.sample_tokens=0", "log.wandb=disabled", "cluster.threads=1", "log.peak_flops=1e11",
]  # fmt: skip
SLUICE = [
    "cluster=ray", "cluster.device=cpu", f"parallel.dp={HOSTS}", "batch_size=12", "micro_batch_size=1",
    "checkpoint.every=10", "steps=100000", f"cluster.hang_after={TIMEOUT}", "cluster.heartbeat=3", "cluster.wait=5",
    f"cluster.restarts={FAILURES}",
]  # fmt: skip


class PlainLog:
    """Reads what the ranks of the plain loop wrote (bench/fault_loop.py)."""

    def __init__(self, folder: Path):
        self._path = folder / "steps.jsonl"

    def lines(self, kind: str) -> list[dict]:
        text = self._path.read_text() if self._path.exists() else ""
        found = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        return [line for line in found if line["kind"] == kind]

    def first_step(self) -> float | None:
        """Time of the first step of any rank."""
        return min((line["time"] for line in self.lines("step")), default=None)

    def step(self) -> int:
        """The newest completed step."""
        return max((line["step"] for line in self.lines("step")), default=0)

    def victim(self, host: str, hosts: Hosts) -> int:
        """Process of the rank that runs on this host."""
        return next(line["pid"] for line in reversed(self.lines("step")) if line["host"] == host)

    def pids(self) -> set[int]:
        return {line["pid"] for line in self.lines("start")}

    def next_step(self, fault: float) -> tuple[float, int] | None:
        """Time of the first step of the ranks that started after the fault, and the number of steps that these ranks
        repeated."""
        steps = self.lines("step")
        again = min((line for line in steps if line["born"] > fault), key=lambda line: line["time"], default=None)
        if again is None:
            return None
        reached = max(line["step"] for line in steps if line["born"] < fault)
        return again["time"], reached - (again["step"] - 1)


class WarmPlainLog(PlainLog):
    """A PlainLog for systems with reserve processes. These start before the fault, so a rank's time of joining a group
    replaces its start."""

    def lines(self, kind: str) -> list[dict]:
        starts = {line["pid"]: line["time"] for line in super().lines("start")}
        return [line | {"born": starts[line["pid"]]} for line in super().lines(kind)]


class TrainerLog:
    """Reads what Sluice's driver and trainer wrote to the run folder."""

    def __init__(self, folder: Path):
        self._folder = folder

    def first_step(self) -> float | None:
        return next((e["time"] for e in read_events(self._folder) if e["kind"] == "first_step"), None)

    def step(self) -> int:
        return last_record(self._folder / "metrics.jsonl").get("step", 0)

    def victim(self, host: str, hosts: Hosts) -> int:
        """Process of the rank on this host, found by the log that it writes to. A reserve process has no log."""
        for pid in hosts.pids(int(host[1:])):
            output = Path(f"/proc/{pid}/fd/1")
            if output.exists() and output.readlink().name.startswith("rank_"):
                return pid
        raise ProcessLookupError(f"no rank on {host}")

    def pids(self) -> set[int]:
        return set()  # the ranks die with their agent

    def next_step(self, fault: float) -> tuple[float, int] | None:
        recovered = (e for e in read_events(self._folder) if e["kind"] == "recovered" and e["time"] > fault)
        return next(((e["time"], e["steps_again"]) for e in recovered), None)


Words = list[str]


@dataclass(frozen=True)
class System:
    """One system. In its functions, `folder` is the folder of a trial."""

    on_ray: bool
    """Whether the hosts run Ray."""
    commands: Callable[[Path, str | None], dict[int, Words]]
    """(folder, address of Ray; None on one machine without Ray) -> for each host the command line after the
    interpreter."""
    log: Callable[[Path], PlainLog | TrainerLog]
    detected: Callable[[Path, float], float | None]
    """(folder, time of the fault) -> when the system noticed."""
    clean: Callable[[str], Words] | None = None
    """(address of Ray) -> command line that removes from Ray what outlives the trial."""


def _trainer(folder: Path, address: str | None) -> dict[int, Words]:
    return {0: ["-m", "train", *TOY, *SLUICE, *_join(address), f"runs={folder}", "name=run"]}


def _sluice_plain(folder: Path, address: str | None) -> dict[int, Words]:
    return {0: ["-m", "bench.fault_drivers", "sluice", str(folder), *SLUICE, *_join(address)]}


def _join(address: str | None) -> Words:
    return [f"cluster.address={address}"] if address else []


def _ray_train(folder: Path, address: str | None) -> dict[int, Words]:
    least = HOSTS - 1 if address else HOSTS
    words = ["-m", "bench.fault_drivers", "ray_train", str(folder), address or "local"]
    return {0: [*words, str(least), str(HOSTS), str(TIMEOUT)]}


def _torchrun(folder: Path, address: str | None) -> dict[int, Words]:
    loop = ["-m", "bench.fault_loop", str(folder), str(TIMEOUT)]
    torchrun = ["-m", "torch.distributed.run"]
    if address is None:
        return {0: [*torchrun, "--standalone", f"--nproc-per-node={HOSTS}", *loop]}
    elastic = [
        f"--nnodes={HOSTS - 1}:{HOSTS}", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=faults",
        f"--rdzv-endpoint={NETWORK}.1:29400", f"--max-restarts={FAILURES}",
        "--rdzv-conf=last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3",
    ]  # fmt: skip
    return {host: [*torchrun, *elastic, *loop] for host in range(HOSTS)}


def _failure_event(folder: Path, fault: float) -> float | None:
    failures = (e["time"] for e in read_events(folder / "run") if e["kind"] == "failure" and e["time"] > fault)
    return next(failures, None)


def _callback(folder: Path, fault: float) -> float | None:
    path = folder / "noticed.jsonl"
    times = [json.loads(line)["time"] for line in path.read_text().splitlines()] if path.exists() else []
    return next((time for time in times if time > fault), None)


def _agent_log(folder: Path, fault: float) -> float | None:
    """Time of the first line in which a torchrun agent reports a failed rank. The agents use this machine's clock."""
    found = []
    for path in folder.glob("output_*.log"):
        for day, clock in re.findall(r"^[EWI](\d{4}) (\S+) .*(?:exitcode|FAILED|UNHEALTHY)", path.read_text(), re.M):
            stamp = datetime.datetime.strptime(f"{datetime.date.today().year}{day} {clock}", "%Y%m%d %H:%M:%S.%f")
            found.append(stamp.timestamp())
    return min((time for time in found if time > fault), default=None)


def _clean_ray(address: str) -> Words:
    return ["-m", "bench.fault_drivers", "clean", address]


SYSTEMS = {
    "sluice": System(True, _trainer, lambda folder: TrainerLog(folder / "run"), _failure_event),
    "sluice_plain": System(True, _sluice_plain, lambda folder: WarmPlainLog(folder / "run"), _failure_event),
    "ray_train": System(True, _ray_train, PlainLog, _callback, _clean_ray),
    "torchrun": System(False, _torchrun, PlainLog, _agent_log),
}

ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "eth0",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
}
"""Environment of every command. Ray Train's defaults for the last two variables are 2 and 60."""
PYTHON = sys.executable
