"""Planned and measured step times for layouts of small models on this CPU. One calibration serves all plans.

    python -m bench.plan_time [--calibration FILE] [--only NAME ...] [--steps 12]

Without a file it first calibrates, on the recipe `tiny` with one thread per rank. Each layout is then trained. The
result is its shortest step after the first three, because other work only ever adds time; the calibration uses the same
principle. The plan gets the imbalance of that step's tokens over the ranks of an expert group (`plan.imbalance`, from
the logged tokens per expert: the busiest rank's share, mean over the layers), because all ranks wait for the busiest in
every layer. Ranks beyond the cores would share them, for which the planner has no rule: two cores, two ranks.

Takes about 6 minutes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from conf.load import compose
from train.plan.time.step_time import plan_time

BASE = ("conf=tiny", "cluster.threads=1", "cluster.device=cpu", "hardware=cpu")
QUIET = ("checkpoint.every=0", "log.wandb=disabled", "log.progress=false", "log.sample_tokens=0", "log.peak_flops=1e11",
         "log.validation_sequences=1", "resume=never")  # fmt: skip
TWO = ("parallel.dp=2",)
PIPELINE = ("parallel.pp=2", "micro_batch_size=4")
LAYOUTS = {
    "one rank": (),
    "one rank, 4 micro-batches": ("micro_batch_size=4",),
    "one rank, all recomputed": ("micro_batch_size=4", "model.recompute=[norm,mla_up,swiglu]"),
    "one rank, a wider model": (
        "micro_batch_size=4",
        "model.hidden=512",
        "model.expert_width=256",
        "model.dense_width=1536",
    ),
    "dp 2": (*TWO, "micro_batch_size=4"),
    "dp 2, ZeRO 2": (*TWO, "micro_batch_size=4", "parallel.zero=2"),
    "dp 2, ep 2, flat": (*TWO, "micro_batch_size=4", "parallel.ep=2"),
    "dp 2, ep 2, node-limited": (*TWO, "micro_batch_size=4", "parallel.ep=2", "parallel.dispatch=node_limited"),
    "dp 2, ep 2, flat, FP8 wire": (*TWO, "micro_batch_size=4", "parallel.ep=2", "parallel.wire=fp8"),
    "pp 2, 1f1b": (*PIPELINE, "parallel.schedule=1f1b"),
    "pp 2, interleaved": (*PIPELINE, "parallel.schedule=interleaved"),
    "pp 2, zbv": (*PIPELINE, "parallel.schedule=zbv"),
    "pp 2, dualpipev": (*PIPELINE, "parallel.schedule=dualpipev"),
}


def measure(overrides: tuple[str, ...], steps: int, runs: str) -> dict:
    """Trains a run. Returns the record of its shortest step."""
    with tempfile.TemporaryDirectory(dir=runs) as folder:
        _train(*QUIET, *overrides, f"steps={steps}", f"runs={folder}", "name=timed")
        lines = (Path(folder) / "timed" / "metrics.jsonl").read_text().splitlines()
    return min((json.loads(line) for line in lines[3:]), key=lambda record: record["step_seconds"])


def imbalance(load: dict[str, list[int]], ep: int) -> float:
    """Tokens of the busiest of `ep` ranks, divided by the mean over the ranks; then the mean over the layers. load:
    tokens of every expert, by layer."""
    over_mean = []
    for tokens in load.values():
        held = len(tokens) // ep
        ranks = [sum(tokens[held * rank : held * (rank + 1)]) for rank in range(ep)]
        over_mean.append(max(ranks) * ep / sum(ranks))
    return sum(over_mean) / len(over_mean)


def calibrate(runs: str) -> str:
    """Calibrates this machine. Returns the path of the calibration."""
    _train("mode=plan", "plan.calibrate=true", f"runs={runs}", "name=calibration")
    return f"{runs}/calibration/calibration.json"


def _train(*overrides: str) -> None:
    subprocess.run([sys.executable, "-m", "train", *BASE, *overrides], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration")
    parser.add_argument("--only", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as runs:
        calibration = options.calibration or calibrate(runs)
        for name in options.only:
            overrides = LAYOUTS[name]
            record = measure(overrides, options.steps, runs)
            took = record["step_seconds"]
            uneven = imbalance(record["load"], compose(*BASE, *overrides).parallel.ep)
            told = f"plan.calibration={calibration}", f"plan.imbalance={uneven}"
            planned = plan_time(compose(*BASE, *overrides, *told)).step_seconds
            print(
                f"{name:30} planned {1e3 * planned:7.1f} ms   measured {1e3 * took:7.1f} ms   "
                f"error {100 * (planned / took - 1):+6.1f} %   imbalance {uneven:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
