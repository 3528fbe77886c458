"""Sequences shared by ranks (parallel.cp) beside whole ones: losses, bytes, memory and time of a step of `tiny`.

Runs on the CPU with one thread per rank. For each number of ranks it prints:

- loss and gradient norm of the second of two steps, and their difference from those of one rank,
- bytes of latents that a rank sends, counted and by the formula of parallel/context.py,
- a rank's peak memory in forward and backward, beyond weights and gradients, over an even share of one rank's peak,
- the core-seconds of a rank for the step, over an even share of one rank's.

    python -m bench.context [--tokens 8192] [--ranks 1 4] [--precision fp32]

Takes about 4 minutes.
"""

import argparse
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist

from conf.load import compose
from conf.schema import Config
from parallel.layout import read_layout
from parallel.mesh import build_mesh
from train.data.batch import Batch
from train.kernels.choice import build_kernels
from train.loop.training_engine import Engine, StepOutcome
from train.optim.schedules import StepPlan
from train.parallelize import parallelize
from train.plan.memory.ledger import PeakMeter
from train.plan.time.traffic import latent_bytes
from train.rank_parts import ParallelModel, RankSetup

CPU = torch.device("cpu")


def config_of(tokens: int, ranks: int, precision: str) -> Config:
    """The configuration of a run with one sequence per step."""
    return compose(
        "conf=tiny", "cluster.device=cpu", f"seq_len={tokens}", f"model.max_seq_len={tokens}", "batch_size=1", "micro_batch_size=1",
        f"parallel.cp={ranks}", f"precision={precision}",
    )  # fmt: skip


def build(config: Config) -> tuple[ParallelModel, Callable[..., StepOutcome]]:
    """Builds a rank in the existing process group. Returns the rank's model, and a function that runs a step by its
    number. All steps have the same random tokens."""
    mesh = build_mesh(read_layout(config, config.parallel.world))
    parts = parallelize(config, mesh, CPU, build_kernels("cpu", config.cluster.compiled))
    draw = torch.Generator().manual_seed(1)
    count = config.batch_size // config.parallel.dp
    batch = Batch(torch.randint(config.model.vocab_size, (count, config.seq_len + 1), generator=draw))
    step = Engine(config, parts, RankSetup(CPU, mesh))

    def run(number: int, on_phase: Callable[[str], None] = lambda _: None) -> StepOutcome:
        plan = StepPlan(number, 0, config.batch_size, lr=1e-4, mtp_weight=0.3, bias_speed=0.0)
        return step.run(plan, batch, on_phase=on_phase)

    return parts, run


def latents_sent(parts: ParallelModel) -> int:
    """Number of bytes that this rank has sent since the last call."""
    if parts.share is None:
        return 0
    taken = parts.share.counters.take()
    return sum(traffic.inside_bytes + traffic.across_bytes for traffic in (taken.forward, taken.backward))


def formula(config: Config) -> int:
    """Number of bytes that a rank sends in a step, without a pipeline: two gathers and one scatter for every layer and
    micro-batch."""
    layers = config.model.layers + config.model.mtp_depth
    return 3 * layers * latent_bytes(config) * (config.batch_size // (config.micro_batch_size * config.parallel.dp))


def run_rank(rank: int, store: str, config: Config, results) -> None:
    """Body of one rank's process."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)  # as train.rank does
    world = config.parallel.world
    dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=rank, world_size=world)
    (parts, run), found = build(config), {}
    run(1)
    latents_sent(parts)
    dist.barrier()
    before = time.process_time()
    outcome = run(2)
    found["seconds"] = time.process_time() - before
    found["loss"], found["norm"] = outcome.measured.main_loss, outcome.update.grad_norm
    found["bytes"] = latents_sent(parts)
    held = sum(weight.nbytes + 4 * weight.numel() for weight in parts.zero.weights())
    held += sum(shard.local.nbytes for shard in parts.zero.shards().values())
    with PeakMeter(CPU) as meter:
        run(3, lambda phase: found.setdefault(phase, meter.mark() - held))
    results.put((rank, found))
    dist.barrier()
    dist.destroy_process_group()


def run(config: Config) -> list[dict[str, float]]:
    """Runs all ranks and returns the result of each."""
    context, world = multiprocessing.get_context("spawn"), config.parallel.world
    results = context.Queue()
    with tempfile.TemporaryDirectory() as store:
        ranks = [context.Process(target=run_rank, args=(rank, store, config, results)) for rank in range(world)]
        for process in ranks:
            process.start()
        found = dict(results.get(timeout=900) for _ in ranks)
        for process in ranks:
            process.join()
    return [found[rank] for rank in range(world)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--precision", default="fp32")
    options = parser.parse_args()
    print(
        f"{'cp':>3} {'loss':>10} {'off':>8} {'norm':>10} {'off':>8} {'MB sent':>8} {'formula':>8} {'memory':>8} {'of share':>8} "
        f"{'core s':>8} {'of share':>8}"
    )
    one = None
    for ranks in options.ranks:
        config = config_of(options.tokens, ranks, options.precision)
        found = run(config)
        one = one or found[0]
        loss, norm = found[0]["loss"], found[0]["norm"]
        memory, seconds = (max(rank[name] for rank in found) for name in ("schedule", "seconds"))
        print(
            f"{ranks:>3} {loss:10.6f} {abs(loss / one['loss'] - 1):8.1e} {norm:10.6f} {abs(norm / one['norm'] - 1):8.1e} "
            f"{found[0]['bytes'] / 1e6:8.2f} {formula(config) / 1e6:8.2f} {memory / 1e6:8.1f} {memory * ranks / one['schedule']:8.3f} "
            f"{seconds:8.2f} {seconds * ranks / one['seconds']:8.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
