"""The cost of a driver on a cluster of thousands of nodes, and how soon it notices a fault.

    python -m bench.driver [--nodes N ...] [--hosts 4] [--window 20] [--out driver.json]

The driver is real. Its calls, which Ray carries to other processes, and its pulse by UDP are real too. The nodes, with
8 ranks each, are simulated: a few host processes represent thousands of agents. These agents answer like
cluster/node/agent.py, and their ranks take a step every few seconds. For every number of nodes:

    started      seconds from the driver's first round to the first step, which takes 5 s itself; all nodes joined,
                 checked and ordered; also the processor time of the driver's process and of the hosts until then
    cores        processor time per second of the driver's process while the run trains; Ray's own threads and the hosts
                 are listed separately
    rank dead    seconds from the death of a rank until the driver judges it
    node lost    seconds from a node's silence until the driver calls it lost
    memory       largest resident size of the driver's process

Exits 1 if a target is missed. Without --nodes: 64 to 8192 nodes, each beside the previous number. The hosts use the
same cores, so figures of a machine with few cores are upper limits.

Takes about a minute for each number of nodes.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.driver_nodes import StubHost
from cluster.driver.driver import Driver
from cluster.driver.messages import DriverPhase, NodeHealth
from cluster.driver.ray_backend import RayFleet
from cluster.driver.view import View
from cluster.topology import Node
from conf.load import compose
from conf.schema import Config

DEVICES = 8
TARGETS = {"started": 30.0, "cores": 0.5, "rank dead": 1.0, "node lost": 5.0 + 0.5, "memory": 500.0}
"""Upper limits in seconds, cores and MiB, for up to 4096 nodes. A node is lost after cluster.heartbeat = 5 s without an
answer; the driver has half a second more to notice this."""
TARGET_NODES = 4096
SIZES = [64, 128, 256, 512, 1024, 2048, 4096, 8192]
SHOWN = 40
"""Maximum characters of an error message in the table."""
PATIENCE = 600.0
"""Maximum seconds that the bench waits for any single event."""


@dataclass
class StubActor:
    """Replaces an agent's actor in RayFleet: it passes each call to the host process of the node."""

    host: Any
    id: str

    def __getattr__(self, method: str) -> "StubMethod":
        return StubMethod(self.host, self.id, method)


@dataclass
class StubMethod:
    host: Any
    id: str
    method: str

    def options(self, **_: Any) -> "StubMethod":
        return self

    def remote(self, *arguments: Any) -> Any:
        return self.host.call.remote(self.id, self.method, *arguments)


class StubFleet(RayFleet):
    """The real fleet, except that its list of nodes is simulated."""

    def __init__(self, config: Config, nodes: int, hosts: int):
        super().__init__(config)
        self.all = [
            Node(f"id{i}", f"n{i}", f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}", DEVICES, f"rack{i // 32}")
            for i in range(nodes)
        ]
        kind = self._ray.remote(StubHost).options(
            num_cpus=0, max_concurrency=4 * nodes // hosts + 16, enable_task_events=False
        )
        self.hosts = [kind.remote() for _ in range(hosts)]

    def _list(self) -> list[Node]:
        self._ray.nodes()  # the real fleet makes this call too; with thousands of nodes it would take longer
        return self.all

    def draining(self) -> dict[str, str]:
        return {}

    def host_of(self, node: str) -> Any:
        return self.hosts[int(node.removeprefix("id")) % len(self.hosts)]

    def _new_actor(self, node: str) -> StubActor:
        return StubActor(self.host_of(node), node)

    def do(self, what: str, node: str) -> float:
        return self._ray.get(getattr(self.host_of(node), what).remote(node))

    def spent(self) -> float:
        """Processor seconds of all host processes so far."""
        return sum(self._ray.get([host.spent.remote() for host in self.hosts]))

    def close(self) -> None:
        self._actors = {}
        for host in self.hosts:
            self._ray.kill(host)
        super().close()


def run_config(nodes: int, runs: str) -> Config:
    """The configuration of the full model, in a layout over these nodes."""
    world = nodes * DEVICES
    pp = 16 if world >= 1024 else 8
    ep = min(64, world // pp)
    dp = world // pp // ep * ep
    words = ["conf=deepseek_v3", "parallel=deepseek_v3", f"parallel.pp={pp}", f"parallel.dp={dp}", f"parallel.ep={ep}"]
    words += [f"batch_size={32 * dp}", "optim.batch_ramp_start=null", "optim.batch_ramp_steps=0", "micro_batch_size=1"]
    words += ["data=stdlib", "steps=1000000", "checkpoint.every_memory=0", f"runs={runs}", "name=stub", "cluster=ray"]
    return compose(*words, "cluster.device=cpu", "cluster.wait=300")


class FaultWatch(threading.Thread):
    """Injects the faults into a driver's run, from a separate thread, and measures the times."""

    def __init__(self, driver: Driver, fleet: StubFleet, window: float):
        super().__init__(daemon=True)
        self.driver, self.fleet, self.window = driver, fleet, window
        self.figures: dict[str, float] = {}
        self.error: str | None = None
        self._main = time.pthread_getcpuclockid(threading.main_thread().ident)
        self._began = time.time()

    def run(self) -> None:
        try:
            self._measure()
        except TimeoutError as error:
            self.error = str(error)
        finally:
            self.driver._stop = "the bench has seen enough"

    def _measure(self) -> None:
        cpu, hosts = time.process_time(), self.fleet.spent()
        self.figures["started"] = self._until(self._stepping, "a first step") - self._began
        self.figures["driver's s"] = time.process_time() - cpu
        self.figures["hosts' s"] = self.fleet.spent() - hosts
        cpu, own, began = time.process_time(), time.clock_gettime(self._main), time.monotonic()
        hosts = self.fleet.spent()
        time.sleep(self.window)
        seconds = time.monotonic() - began
        self.figures["cores"] = (time.process_time() - cpu) / seconds
        self.figures["hosts' cores"] = (self.fleet.spent() - hosts) / seconds
        self.figures["of Ray's threads"] = self.figures["cores"] - (time.clock_gettime(self._main) - own) / seconds
        supervisor = self.driver.supervisor
        node = supervisor.attempt.reachable[1]
        died = self.fleet.do("kill_rank", node)
        judged = self._until(lambda: supervisor.phase is DriverPhase.judging, "a judgement")
        self.figures["rank dead"] = judged - died
        number = supervisor.number
        self._until(lambda: supervisor.number > number and self._stepping(), "the next attempt")
        node = supervisor.attempt.reachable[-1]
        fell = self.fleet.do("be_silent", node)
        lost = self._until(lambda: supervisor.nodes[node].health is not NodeHealth.ok, "a lost node")
        self.figures["node lost"] = lost - fell
        self.figures["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def _stepping(self) -> bool:
        attempt = self.driver.supervisor.attempt
        return self.driver.supervisor.phase is DriverPhase.running and attempt is not None and attempt.stepping

    @staticmethod
    def _until(condition: Any, what: str) -> float:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} did not come within {PATIENCE:.0f} s")
            time.sleep(0.01)
        return time.time()


def measure(nodes: int, hosts: int, window: float, answer: Any) -> None:
    """Measures a run on `nodes` nodes. Sends the figures, or the error, through a pipe."""
    with tempfile.TemporaryDirectory() as runs:
        config = run_config(nodes, runs)
        folder = Path(runs) / "stub"
        folder.mkdir()
        (folder / "config.yaml").write_text("stub\n")
        fleet = StubFleet(config, nodes, hosts)
        try:
            view = View("stub", folder / "metrics.jsonl", config.steps, Console(file=sys.stderr, quiet=True))
            driver = Driver(config, folder, ["-m", "train.worker", "config.yaml"], fleet, None, False, view)
            watch = FaultWatch(driver, fleet, window)
            watch.start()
            finish = driver.run()
            watch.join(10)
        finally:
            fleet.close()
    answer.send(
        watch.figures | ({"error": (watch.error or finish.text)[:300]} if "memory" not in watch.figures else {})
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.driver", description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=SIZES, help="numbers of nodes, 8 ranks each")
    parser.add_argument("--hosts", type=int, default=4, help="processes that play the nodes")
    parser.add_argument("--window", type=float, default=20.0, help="seconds over which processor time is taken")
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    options = parser.parse_args(arguments)
    table = Table(
        "nodes",
        "started s",
        "driver's s",
        "hosts' s",
        "cores",
        "of Ray's threads",
        "hosts' cores",
        "rank dead s",
        "node lost s",
        "memory MiB",
        "missed",
    )
    rows, missed = [], False
    for nodes in options.nodes:
        here, there = multiprocessing.get_context("spawn").Pipe(duplex=False)
        words = nodes, options.hosts, options.window, there
        process = multiprocessing.get_context("spawn").Process(target=measure, args=words, daemon=True)
        process.start()
        there.close()
        try:
            figures = here.recv()
        except EOFError:
            figures = {"error": "the driver died"}
        process.join(60)
        late = [name for name, limit in TARGETS.items() if not figures.get(name, float("inf")) <= limit]
        missed |= bool(late) and nodes <= TARGET_NODES
        rows.append({"nodes": nodes, **figures, "missed": late})
        shown = [f"{figures[name]:.2f}" if name in figures else "-" for name in NAMES[:-1]]
        memory = f"{figures['memory']:.0f}" if "memory" in figures else "-"
        table.add_row(str(nodes), *shown, memory, figures.get("error", ", ".join(late))[:SHOWN] or "-")
        print(json.dumps(rows[-1]), flush=True)
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)
    if options.out:
        options.out.write_text(json.dumps({"targets": TARGETS, "rows": rows}, indent=1))
    return int(missed)


NAMES = (
    "started",
    "driver's s",
    "hosts' s",
    "cores",
    "of Ray's threads",
    "hosts' cores",
    "rank dead",
    "node lost",
    "memory",
)

if __name__ == "__main__":
    raise SystemExit(main())
