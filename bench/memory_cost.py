"""Time cost of each way to save memory: a step of `tiny` with it beside the same step without.

Runs on the CPU, one rank with one thread. Both sides of a case are separate processes and take turns. The result is the
median ratio of CPU time over the rounds; other work changes CPU time little. Here the host's memory is the device's:
offloading is a plain copy in each direction, and the computing waits for both. On a GPU such copies overlap with
computing, and `mode=plan` says whether they finish in time. bench.context measures the cost of `parallel.cp`.

    python -m bench.memory_cost [--rounds 5] [--only layer offload optimizer]

Takes about 4 minutes.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from bench.sides import Side, SideResult, serve, take_turns

SECONDS = 2.0
"""Seconds of a side in a round; a side always takes at least one step."""


class SavingCase(NamedTuple):
    """Two sides of a comparison."""

    what: str
    both: list[str]
    without: list[str]
    there: list[str]


SHORT = ["batch_size=8", "micro_batch_size=2", "model.recompute=[norm,mla_up,swiglu]"]
CASES = {
    "layer": SavingCase("layer in model.recompute as well", SHORT, [], ["model.recompute=[norm,mla_up,swiglu,layer]"]),
    "offload": SavingCase("model.offload=[layer]", SHORT, [], ["model.offload=[layer]"]),
    "optimizer": SavingCase("parallel.offload_optimizer=true", SHORT, [], ["parallel.offload_optimizer=true"]),
}


def start(overrides: list[str]) -> Side:
    """Starts a rank that trains with these overrides."""
    return Side([sys.executable, "-m", "bench.memory_cost", "--side", json.dumps(overrides)], tokens=1)


def build_step(overrides: list[str]) -> Callable[[], object]:
    """Builds the training step of a single rank."""
    from train.kernels.cpu.processor import tune_cpu

    tune_cpu()
    import torch
    import torch.distributed as dist

    from bench.context import build
    from conf.load import compose

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    _, run = build(compose("conf=tiny", "cluster.device=cpu", *overrides))
    return partial(run, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--side", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        return serve(partial(build_step, options.side))
    print(f"{'':34} {'CPU s of a step':>15} {'without':>8} {'ratio':>6}  range")
    for name in options.only:
        what, both, without, there = CASES[name]
        sides = {"without": partial(start, [*both, *without]), "there": partial(start, [*both, *there])}
        found = take_turns(sides, options.rounds, SECONDS)
        one, other = found["without"], found["there"]
        if not (isinstance(one, SideResult) and isinstance(other, SideResult)):
            print(f"{what:34} cannot run: {next(side for side in found.values() if isinstance(side, str))}")
            continue
        each = [b / a for a, b in zip(one.cpu_seconds, other.cpu_seconds, strict=True)]
        seconds = (statistics.median(side.cpu_seconds) for side in (other, one))
        print(
            "{:34} {:15.3f} {:8.3f} {:6.3f}  {:.3f} to {:.3f}".format(
                what, *seconds, statistics.median(each), min(each), max(each)
            ),
            flush=True,
        )
    return None


if __name__ == "__main__":
    main()
