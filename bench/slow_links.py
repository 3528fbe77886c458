"""A training step over slow links, with and without the all-to-all under compute. Needs root.

    python -m bench.slow_links [--across 100] [--steps 12] [--rounds 2] [key=value ...]

Two network namespaces stand for two nodes with a rank each, joined by a link of --across Mbit/s (token buckets), and run
the trainer on `tiny` with experts on both (ep = 2) and no pipeline:

    1f1b            one micro-batch after the other
    dualpipev off   the same as two stages on every rank, parallel.overlap=false
    dualpipev on    parallel.overlap=true: the forward of one micro-batch runs together with the backward of another

Printed are medians over the steps of all rounds but the first two of each run: seconds of a step and of waiting for tokens.
The links cost no processor time beyond gloo's own, which shares the two cores with the ranks.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.wire_bytes import Network

CASES = {
    "1f1b": ["parallel.schedule=1f1b"],
    "dualpipev off": ["parallel.schedule=dualpipev", "parallel.overlap=false"],
    "dualpipev on": ["parallel.schedule=dualpipev", "parallel.overlap=true"],
}
RECIPE = [
    "conf=tiny", "parallel.dp=2", "parallel.ep=2", "batch_size=16", "micro_batch_size=1", "cluster.threads=1",
    "cluster.device=cpu", "log.wandb=disabled", "log.progress=false", "log.sample_tokens=0", "log.peak_flops=1e11",
]  # fmt: skip
NODES, WARM = 2, 2


def run(network: Network, runs: Path, name: str, overrides: list[str]) -> list[dict]:
    """Train on both nodes; the records of all steps."""
    words = [sys.executable, "-m", "train", *RECIPE, f"runs={runs}", f"name={name}", *overrides]
    processes = []
    try:
        for rank, node in enumerate(network.nodes):
            environment = os.environ | {
                "RANK": str(rank), "WORLD_SIZE": str(NODES), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "eth0",
            }  # fmt: skip
            command = ["ip", "netns", "exec", node, *words]
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
        codes = [process.wait(600) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(codes):
        raise RuntimeError(f"{name}: ranks ended with exit codes {codes}")
    return [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--across", type=int, default=100, help="Mbit/s between the nodes")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    options, overrides = parser.parse_known_args()
    found: dict[str, list[dict]] = {name: [] for name in CASES}
    with Network(NODES) as network, tempfile.TemporaryDirectory() as folder:
        network.limit(options.across, 10 * options.across)
        for number in range(options.rounds):
            for name, case in CASES.items():
                run_name = f"{name.replace(' ', '_')}_{number}"
                words = [f"steps={options.steps}", *case, *overrides]
                found[name] += run(network, Path(folder), run_name, words)[WARM:]
    print(
        f"tiny, ep=2 on {NODES} nodes, {options.across} Mbit/s between them, {options.rounds} x {options.steps} steps"
    )
    print(f"{'':16}{'step s':>9}{'of 1f1b':>9}{'waiting s':>11}")
    base = statistics.median(record["step_seconds"] for record in found["1f1b"])
    for name, records in found.items():
        step, waited = (
            statistics.median(record[key] for record in records) for key in ("step_seconds", "dispatch_wait_seconds")
        )
        print(f"{name:16}{step:9.2f}{step / base:9.2f}{waited:11.2f}")


if __name__ == "__main__":
    main()
