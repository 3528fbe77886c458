"""Cost of a step with Muon beside one with AdamW, and the difference that a plan predicts.

    python -m bench.optimizer_cost [--shape debug] [--length 512] [--rounds 3]

Both train in one process on one CPU thread and take turns, one step each. Prints core-seconds of a whole step, which
other work changes less, and the median of the ratios of the rounds. The predicted difference is the operations of
Newton-Schulz over the rate of a large fp32 matmul, timed in the same rounds. A plan uses the same formula, with rates
from published figures or from `plan.calibrate`.

Takes about 2 minutes.
"""

import argparse
import statistics
import time
from collections.abc import Callable

from bench.train_step import SHAPES, Case, own_step

OPTIMIZERS = ("adamw", "muon")
SQUARE = 1024
"""Side length of the matmul whose rate is measured."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shape", choices=tuple(SHAPES), default="debug")
    arguments.add_argument("--length", type=int, help="tokens of a sequence; the shape's own by default")
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    from train.kernels.cpu.processor import tune_cpu

    tune_cpu()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        compare(options)
    finally:
        dist.destroy_process_group()


def compare(options: argparse.Namespace) -> None:
    """Train with each optimizer in turn, and print the times."""
    import torch

    from train.plan.time.update import count_weights

    case = Case(options.shape, threads=1, length=options.length)
    steps = {name: own_step(case, more=[f"optim={name}"]) for name in OPTIMIZERS}
    for step in steps.values():
        step()
    cpu: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    rates, square = [], torch.randn(SQUARE, SQUARE)
    for _ in range(options.rounds):
        for name, step in steps.items():
            cpu[name].append(core_seconds(step))
        rates.append(2 * SQUARE**3 / core_seconds(lambda: square @ square))
    config = case.config("optim=muon")
    held = count_weights(config, [range(config.model.layers)], [0], 0).orthogonal
    planned = sum(one.flops for one in held) / max(rates)
    ratios = [muon / adamw for adamw, muon in zip(*cpu.values(), strict=True)]
    difference = statistics.median(muon - adamw for adamw, muon in zip(*cpu.values(), strict=True))
    print(f"{case.shape}, {case.tokens} tokens a step, one thread, core-seconds of a step, {options.rounds} rounds")
    for name, seconds in cpu.items():
        print(f"  {name:6s} {statistics.median(seconds):7.2f}  ({min(seconds):.2f} to {max(seconds):.2f})")
    print(f"  muon takes {statistics.median(ratios):.2f} times as long ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"  more by {difference:.2f} s; planned {planned:.2f} s: {sum(one.flops for one in held) / 1e9:.0f} GFLOP")


def core_seconds(step: Callable[[], object]) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


if __name__ == "__main__":
    main()
