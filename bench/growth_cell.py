"""One point of bench/growth.py: a rank that takes training steps, and the count of its arithmetic.

python -m bench.growth_cell run CELL RANK STORE     one rank; prints a Sample
python -m bench.growth_cell count CELLS             the Arithmetic of every cell
"""

import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass

from bench.train_step import Case, own_step

BALANCE_LOSS = 1e-4
WARM_STEPS = 2


@dataclass(frozen=True)
class Cell(Case):
    """`tiny` without MTP, in bf16, with one thread per rank. One of its sizes is changed."""

    shape: str = "tiny"
    threads: int = 1
    sequences: int = 4
    """Number of sequences per rank and step."""
    length: int = 256
    dp: int = 1
    ep: int = 1
    overrides: tuple[str, ...] = ()
    steps: int = 4
    """Number of timed steps."""

    @property
    def size(self) -> tuple[int, int]:
        return self.sequences, self.length

    def config(self, *more: str):
        layout = f"parallel.dp={self.dp}", f"parallel.ep={self.ep}", f"batch_size={self.sequences * self.dp}"
        return super().config(f"model.max_seq_len={max(4096, self.length)}", *layout, *self.overrides, *more)


@dataclass
class Sample:
    """Measurements of one rank: medians over its steps."""

    step: float
    """Seconds."""
    compute: float
    """Seconds of forward and backward."""
    update: float
    """Seconds of reduction, clipping and AdamW."""
    cpu: float
    """CPU seconds of a step, all threads."""
    peak: int
    """Peak resident bytes, beyond those of the process after all imports."""
    tensors: int
    """Peak bytes of all tensors, counted in an additional step."""


@dataclass
class Arithmetic:
    """The arithmetic of one rank in one step."""

    flops: float
    """Floating-point operations, as train/model/count.py counts them."""
    attention: float
    """The part of `flops` that attention spends on pairs of positions."""
    state: int
    """Bytes of weights, fp32 gradients, master weights and moments."""
    planned: int
    """Bytes of the planned peak (mode=plan): state and activations."""


def run(cell: Cell, rank: int, store: str) -> Sample:
    """Body of a rank's process."""
    from train.kernels.cpu.processor import tune_cpu

    tune_cpu()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401 so that its memory does not count as the step's
    import psutil
    import torch
    import torch.distributed as dist

    import train.parallelize  # noqa: F401
    from train.loop.hooks.rank_progress import peak_memory
    from train.plan.memory.ledger import PeakMeter

    torch.set_num_threads(cell.threads)
    dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=rank, world_size=cell.dp)
    before = psutil.Process().memory_info().rss
    step = own_step(cell, BALANCE_LOSS)
    samples = [_timed(step) for _ in range(WARM_STEPS + cell.steps)][WARM_STEPS:]
    peak = peak_memory(torch.device("cpu")) - before
    with PeakMeter(torch.device("cpu")) as meter:
        step()
        tensors = meter.mark()
    dist.barrier()
    dist.destroy_process_group()
    return Sample(*(statistics.median(column) for column in zip(*samples, strict=True)), peak, tensors)


def _timed(step) -> tuple[float, float, float, float]:
    cpu, began = time.process_time(), time.perf_counter()
    compute, update = step()
    return time.perf_counter() - began, compute, update, time.process_time() - cpu


def count(cell: Cell) -> Arithmetic:
    """The minimum work and memory of a rank."""
    from train.model.count import flops_per_token
    from train.plan.memory.rank_memory import plan_memory
    from train.plan.memory.rank_weights import FP32_BYTES

    config = cell.config("hardware=cpu")
    plan = plan_memory(config)[0]
    weights = plan.items["weights"]
    state = weights + plan.items["master"] + plan.items["moments"] + weights // 2 * FP32_BYTES
    flops, products = (cell.tokens * flops_per_token(config.model, length) for length in (config.seq_len, 0))
    planned = plan.peak_bytes - plan.items.get("checkpoint", 0)  # a cell saves no checkpoint
    return Arithmetic(flops, flops - products, state, planned)


def cell_of(text: str) -> Cell:
    """The cell of a command line."""
    fields = json.loads(text)
    return Cell(**fields | {"overrides": tuple(fields["overrides"])})


def main() -> None:
    if sys.argv[1] == "run":
        sample = run(cell_of(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
        print(json.dumps(asdict(sample)), flush=True)
    else:
        print(json.dumps([asdict(count(cell_of(json.dumps(fields)))) for fields in json.loads(sys.argv[2])]))


if __name__ == "__main__":
    main()
