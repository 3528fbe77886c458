"""Bytes between nodes and step times of the three ways to dispatch, on network namespaces as nodes. Needs root.

    python -m bench.wire_bytes [--nodes 2 4] [--across 200] [--inside 2000]

Every node is a network namespace with its own address, joined to the others by a veth pair and a bridge, and runs 2
ranks; ranks of one node meet over its loopback. Routing is the paper's: of N groups of experts, one per node, a token
takes the N/2 with the best two scores and its top 4 among them. Measured, with bf16 activations, on the interfaces
themselves (/proc/net/dev, so with TCP/IP headers and split counts):

    bytes    sent by eth0 of all nodes, per token: dispatch forward, and all four exchanges of a training step
    time     of a step's four exchanges with a token bucket on each link: --across Mbit/s on eth0, --inside on loopback

Experts do nothing here: the step is communication alone. Everything made is removed at the end, after a failure too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.expert.build import build_dispatcher

RANKS_PER_NODE, TOKENS, HIDDEN, TOP_K, EXPERTS_PER_RANK = 2, 512, 1024, 4, 8
WAYS = {
    "flat bf16": ("flat", "bf16"),
    "node-limited bf16": ("node_limited", "bf16"),
    "node-limited fp8": ("node_limited", "fp8"),
}


class Network:
    """N namespaces on a bridge that lives in a namespace of its own, so the host's network stays as it is."""

    def __init__(self, nodes: int):
        self.prefix = f"sluice{os.getpid()}"
        self.switch = f"{self.prefix}sw"
        self.nodes = [f"{self.prefix}n{node}" for node in range(nodes)]
        self.made: list[str] = []

    def __enter__(self) -> "Network":
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for name in self.made:
            subprocess.run(["ip", "netns", "del", name], check=False)

    def _build(self) -> None:
        self._add(self.switch)
        self.run(self.switch, "ip link add br0 type bridge")
        self.run(self.switch, "ip link set br0 up")
        for node, name in enumerate(self.nodes):
            self._add(name)
            port = f"port{node}"
            command = f"ip link add eth0 netns {name} type veth peer name {port} netns {self.switch}"
            subprocess.run(command.split(), check=True)
            self.run(name, f"ip addr add 10.77.0.{node + 1}/24 dev eth0")
            self.run(name, "ip link set lo up")
            self.run(name, "ip link set eth0 up")
            self.run(self.switch, f"ip link set {port} master br0")
            self.run(self.switch, f"ip link set {port} up")

    def _add(self, name: str) -> None:
        subprocess.run(["ip", "netns", "add", name], check=True)
        self.made.append(name)

    def run(self, name: str, command: str) -> None:
        subprocess.run(["ip", "netns", "exec", name, *command.split()], check=True)

    def limit(self, across: int, inside: int) -> None:
        """Token buckets, in Mbit/s. The burst covers 10 ms and at least one of loopback's 64 KiB packets."""
        for name in self.nodes:
            for device, rate in (("eth0", across), ("lo", inside)):
                burst = max(128, rate * 10 // 8)
                self.run(name, f"tc qdisc add dev {device} root tbf rate {rate}mbit burst {burst}kb latency 200ms")


def run_nodes(nodes: int, mode: str, rounds: int, limits: tuple[int, int] | None) -> dict:
    """Run the ranks on a fresh network and return what rank 0 measured."""
    world = nodes * RANKS_PER_NODE
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    with Network(nodes) as network, tempfile.TemporaryDirectory() as folder:
        if limits:
            network.limit(*limits)
        processes = []
        try:
            for rank in range(world):
                worker = [sys.executable, "-m", "bench.wire_bytes", "--worker", folder, mode]
                worker += [str(rank), str(world), str(rounds)]
                name = network.nodes[rank // RANKS_PER_NODE]
                processes.append(subprocess.Popen(["ip", "netns", "exec", name, *worker], env=environment))
            # Not one after the other: the ranks beside a dead one wait for it.
            while running := [process for process in processes if process.poll() is None]:
                if any(process.returncode for process in processes):
                    break
                time.sleep(0.05)
            codes = [process.returncode for process in processes]
            if running or any(codes):
                raise RuntimeError(f"ranks ended with exit codes {codes}")
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return json.loads((Path(folder) / "result").read_text())


def eth0_sent() -> int:
    """Bytes that this node's eth0 has sent."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("eth0:"))
    return int(line.split(":")[1].split()[8])


def route(nodes: int, generator: torch.Generator) -> Tensor:
    """Node-limited top 4 of random scores (paper 2.1.2), half of the nodes: ids_TK."""
    scores_TNE = torch.rand(TOKENS, nodes, RANKS_PER_NODE * EXPERTS_PER_RANK, generator=generator)
    best_TN = scores_TNE.topk(2, 2).values.sum(2)
    keep_TN = torch.zeros_like(best_TN).scatter_(1, best_TN.topk(nodes // 2, 1).indices, 1.0)
    return (scores_TNE * keep_TN[..., None]).flatten(1).topk(TOP_K, 1).indices


class Rank:
    """One rank's dispatchers, tokens and measurements."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world, self.nodes = rank, world, world // RANKS_PER_NODE
        inside = [dist.new_group(range(n * RANKS_PER_NODE, (n + 1) * RANKS_PER_NODE)) for n in range(self.nodes)]
        across = [dist.new_group(range(local, world, RANKS_PER_NODE)) for local in range(RANKS_PER_NODE)]
        self.dispatchers = {
            way: build_dispatcher(
                name,
                wire=wire,
                experts=world * EXPERTS_PER_RANK,
                ep_group=dist.group.WORLD,
                intra_group=inside[rank // RANKS_PER_NODE],
                inter_group=across[rank % RANKS_PER_NODE],
                ranks_per_node=RANKS_PER_NODE,
                groups=self.nodes,
            )
            for way, (name, wire) in WAYS.items()
        }
        generator = torch.Generator().manual_seed(rank)
        self.ids_TK = route(self.nodes, generator)
        self.gates_TK = torch.rand(TOKENS, TOP_K, generator=generator).requires_grad_()
        self.x_TD = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16().requires_grad_()

    def dispatch(self, way: str) -> None:
        with torch.no_grad():
            self.dispatchers[way].dispatch(self.x_TD, self.ids_TK, self.gates_TK)

    def step(self, way: str) -> None:
        dispatcher = self.dispatchers[way]
        routed = dispatcher.dispatch(self.x_TD, self.ids_TK, self.gates_TK)
        y_TD = dispatcher.combine(routed.rows_RD * routed.gates_R[:, None].bfloat16(), routed)
        y_TD.backward(torch.ones_like(y_TD))

    def bytes_per_token(self, call, way: str, rounds: int) -> dict[str, float]:
        """Bytes that one token of any rank costs on all eth0 together, and as the counters say."""
        call(way)
        self.dispatchers[way].counters.take()
        dist.barrier()
        start = eth0_sent()
        for _ in range(rounds):
            call(way)
        dist.barrier()
        sent = eth0_sent() - start if self.rank % RANKS_PER_NODE == 0 else 0
        taken = self.dispatchers[way].counters.take()
        total = torch.tensor([sent, taken.forward.across_bytes + taken.backward.across_bytes], dtype=torch.float64)
        dist.all_reduce(total)
        wire, counted = (total / (rounds * TOKENS * self.world)).tolist()
        return {"interface": wire, "counters": counted}

    def seconds(self, rounds: int) -> dict[str, list[float]]:
        """Step times of every way, in turn."""
        times = {way: [] for way in WAYS}
        for index in range(rounds + 1):
            for way in WAYS:
                dist.barrier()
                start = time.perf_counter()
                self.step(way)
                dist.barrier()
                if index:
                    times[way].append(time.perf_counter() - start)
        return times


def work(folder: str, mode: str, rank: int, world: int, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    me = Rank(rank, world)
    if mode == "bytes":
        calls = {"dispatch": me.dispatch, "step": me.step}
        result = {way: {name: me.bytes_per_token(call, way, rounds) for name, call in calls.items()} for way in WAYS}
    else:
        result = me.seconds(rounds)
    if rank == 0:
        (Path(folder) / "result").write_text(json.dumps(result))
    dist.destroy_process_group()


def report(nodes: int, rounds: int, across: int, inside: int) -> None:
    print(f"\n{nodes} nodes of {RANKS_PER_NODE} ranks, {nodes // 2} nodes a token, top {TOP_K}, width {HIDDEN}")
    volume = run_nodes(nodes, "bytes", rounds, None)
    for part in ("dispatch", "step"):
        flat = volume["flat bf16"][part]["interface"]
        for way, parts in volume.items():
            seen, counted = parts[part]["interface"], parts[part]["counters"]
            print(f"  {part:9}{way:18} {seen:9.0f} B/token on eth0 ({counted:.0f} counted), {seen / flat:.3f} of flat")
    times = run_nodes(nodes, "time", rounds, (across, inside))
    flat = statistics.median(times["flat bf16"])
    for way, taken in times.items():
        median = statistics.median(taken)
        print(
            f"  time     {way:18} {median * 1e3:9.0f} ms (least {min(taken) * 1e3:.0f}), {median / flat:.3f} of flat",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4], help="even numbers of nodes")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each way, 1 or more")
    parser.add_argument("--across", type=int, default=200, help="Mbit/s between nodes in the timed part")
    parser.add_argument("--inside", type=int, default=2000, help="Mbit/s inside a node in the timed part")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        folder, mode, *numbers = args.worker
        return work(folder, mode, *map(int, numbers))
    if os.geteuid():
        parser.error("network namespaces need root")
    for nodes in args.nodes:
        report(nodes, args.rounds, args.across, args.inside)
    return None


if __name__ == "__main__":
    main()
