"""The planned peak of memory beside the measured peak, phase by phase, for many layouts and recipes on the CPU.

Every rank of a small model starts, makes a step, saves, validates, makes the measured step, and starts again
(train/dry_run/run_phases.py). Every tensor of the rank is counted (train/plan/memory/ledger.py), and files of copies in
memory. A line is a phase of the rank with the largest error: its planned and measured peak, in MB, and the plan's
error. On a CPU the host's memory is the device's, so a peak covers both.

Routing is forced to be even, so that the plan need not guess it.

    python -m bench.plan_memory [CASE ...]

Takes about 15 minutes.
"""

import argparse
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import train.kernels.plain.routing as routing
from conf.load import compose
from conf.schema import Config
from parallel.layout import read_layout
from parallel.mesh import build_mesh
from train.data.batch import Batch
from train.dry_run.run_phases import RunPhases
from train.kernels.choice import build_kernels
from train.loop.training_engine import Engine
from train.optim.schedules import StepPlan
from train.parallelize import parallelize
from train.plan.memory.rank_memory import phases, scene_of
from train.rank_parts import ParallelModel, RankSetup

RUN = [
    "conf=tiny",
    "hardware=cpu",
    "cluster.device=cpu",
    "seq_len=128",
    "batch_size=4",
    "micro_batch_size=1",
    "plan.imbalance=1",
]
ALL_SAVES = [
    "optim.ema_decay=0.9",
    "checkpoint.every=1",
    "checkpoint.weights_every=1",
    "cluster=ray",
    "checkpoint.every_memory=1",
]
"""Settings of a run that has all possible phases."""
ALL = "model.recompute=[norm,mla_up,swiglu]"


def _pp(ranks: int, schedule: str, *more: str) -> list[str]:
    return [f"parallel.pp={ranks}", f"parallel.schedule={schedule}", "model.layers=8", "batch_size=8", *more]


LETS_GO = 0.002
"""Seconds that a rank sleeps after each wait for a collective. gloo's thread holds the tensors of its collective until
the thread runs again. On a busy machine, the rank may continue long before this; the held tensors were up to 2.3 % of a
peak."""
EP2 = ["parallel.dp=2", "parallel.ep=2"]
LORA = ["precision=bf16", "adapter=lora", "init_from=X", "optim=tune"]
CASES = {
    "fp32": ["precision=fp32"],
    "bf16": ["precision=bf16"],
    "bf16, recompute all": ["precision=bf16", ALL],
    "fp8": ["precision=fp8"],
    "fp8, recompute all, MTP 2": ["precision=fp8", ALL, "model.mtp_depth=2"],
    "bf16, long, no MTP": [
        "precision=bf16",
        "model.mtp_depth=0",
        "seq_len=1024",
        "batch_size=2",
        "model.loss_chunk=512",
    ],
    "bf16, documents apart": ["precision=bf16", "data.mask_documents=true"],
    "bf16, fp32 moments": ["precision=bf16", "precision.moments=fp32"],
    "bf16 dp2": ["precision=bf16", "parallel.dp=2"],
    "fp32 dp2 zero2": ["precision=fp32", "parallel.dp=2", "parallel.zero=2"],
    "bf16 dp2 zero2": ["precision=bf16", "parallel.dp=2", "parallel.zero=2"],
    "bf16 dp2 zero3": ["precision=bf16", "parallel.dp=2", "parallel.zero=3"],
    "fp32 dp4 ep2 zero3": ["precision=fp32", "parallel.dp=4", "parallel.ep=2", "parallel.zero=3"],
    "bf16 dp2 ep2 zero3, MTP 2": ["precision=bf16", *EP2, "parallel.zero=3", "model.mtp_depth=2"],
    "bf16 dp2 zero3, no MTP": ["precision=bf16", "parallel.dp=2", "parallel.zero=3", "model.mtp_depth=0", ALL],
    "fp32 ep2": ["precision=fp32", *EP2],
    "bf16 dp4 ep2, fp8 wire": ["precision=bf16", "parallel.dp=4", "parallel.ep=2", "parallel.wire=fp8"],
    "fp8 ep4 node_limited": [
        "precision=fp8",
        "parallel.dp=4",
        "parallel.ep=4",
        "parallel.dispatch=node_limited",
        "cluster.ranks_per_node=2",
    ],
    "fp8 dp2 ep2, fp8 wire": ["precision=fp8", *EP2, "parallel.wire=fp8"],
    "bf16 pp2 1f1b": ["precision=bf16", *_pp(2, "1f1b")],
    "bf16 pp4 1f1b, recompute all": ["precision=bf16", *_pp(4, "1f1b", ALL)],
    "bf16 pp2 interleaved": ["precision=bf16", *_pp(2, "interleaved")],
    "bf16 pp2 zbv": ["precision=bf16", *_pp(2, "zbv")],
    "fp32 pp4 zbv": ["precision=fp32", *_pp(4, "zbv")],
    "bf16 cp2": ["precision=bf16", "parallel.cp=2"],
    "fp32 cp4, MTP 2": ["precision=fp32", "parallel.cp=4", "model.mtp_depth=2"],
    "bf16 cp2 zero3": ["precision=bf16", "parallel.cp=2", "parallel.zero=3"],
    "bf16 pp2 cp2 zbv": ["precision=bf16", *_pp(2, "zbv", "parallel.cp=2")],
    "bf16 pp2 dualpipev": ["precision=bf16", *_pp(2, "dualpipev")],
    "bf16 pp2 dualpipev, one by one": ["precision=bf16", *_pp(2, "dualpipev", "parallel.overlap=false")],
    "fp8 pp2 ep2 dualpipev": ["precision=fp8", *_pp(2, "dualpipev", *EP2, "batch_size=16")],
    "bf16 pp2 dualpipev, activations on the host": [
        "precision=bf16",
        *_pp(2, "dualpipev", "parallel.overlap=false", "model.offload=[layer]"),
    ],
    "bf16 dp2, optimizer on the host": ["precision=bf16", "parallel.dp=2", "parallel.offload_optimizer=true"],
    "adapter": LORA,
    "adapter beside blocks": [*LORA, "adapter.base=fp8"],
    "adapter pp2 zbv": [*LORA, *_pp(2, "zbv")],
    "adapter ep2 zero3": [*LORA, *EP2, "parallel.zero=3"],
    "bf16 pp2 zbv, MTP 2": ["precision=bf16", *_pp(2, "zbv", "model.mtp_depth=2")],
}


def measure(config: Config, rank: int, folder: Path, again: bool = True) -> dict[str, int]:
    """Measures the peaks of a run's phases: a later step, and everything that the run does once. folder: for the files
    of all ranks. again: whether to measure starts from these files too.
    """
    parallel, device = config.parallel, torch.device("cpu")
    layout = read_layout(config, parallel.world)
    setup, kernels = RankSetup(device, build_mesh(layout)), build_kernels("cpu", config.cluster.compiled)
    share = config.batch_size // parallel.dp
    draw = torch.Generator().manual_seed(layout.dp_rank(rank))
    tokens_BS = torch.randint(0, config.model.vocab_size, (share, config.seq_len + 1), generator=draw)
    documents_BS = None
    if config.data.mask_documents:  # four documents per sample
        positions_S = torch.arange(config.seq_len + 1, dtype=torch.int32)
        documents_BS = (4 * positions_S // len(positions_S)).repeat(share, 1)

    def build(restored: bool) -> ParallelModel:
        return parallelize(config, setup.mesh, device, kernels, restored=restored)

    def train(life: RunPhases) -> None:
        parts, state = life.begin("start")
        step = Engine(config, parts, setup)

        def run(number: int, on_phase: Callable[[str], None]) -> None:
            plan = StepPlan(number, 0, config.batch_size, lr=1e-4, mtp_weight=0.3, bias_speed=0.0)
            step.run(plan, Batch(tokens_BS, documents_BS), on_phase=on_phase)

        run(1, lambda _: None)
        with life.meter() as meter:
            life.go_on(parts, state, tokens_BS, meter)
            dist.barrier()  # one rank has exported
            # After a validation, DeepSpeed records the order of modules again, and in this step gathers no weights
            # ahead.
            if config.parallel.zero == 3:
                run(2, lambda _: None)
            run(3, lambda phase: life.mark(phase, meter))
        parts.zero.engine.destroy()

    with _waits_for_threads(), RunPhases(config, setup, folder, build, is_alone=False) as life:
        train(life)
        if again:
            life.begin_again()
    return {phase: one.device for phase, one in life.peaks.items()}


@contextmanager
def _waits_for_threads() -> Iterator[None]:
    """After each wait for a collective, the rank sleeps, so that gloo's threads can run."""
    wait = dist.Work.wait

    def waits(work: dist.Work, timeout: timedelta | None = None) -> bool:
        done = wait(work) if timeout is None else wait(work, timeout)
        time.sleep(LETS_GO)
        return done

    dist.Work.wait = waits
    try:
        yield
    finally:
        dist.Work.wait = wait


def planned_peaks(config: Config, rank: int) -> dict[str, int]:
    """Planned peaks of the phases of a run, including a start from an exported folder."""
    layout = read_layout(config, config.parallel.world)
    if config.checkpoint.weights_every:
        config = replace(config, init_from="its own weights")
    found = phases(config, layout.pp_rank(rank), layout.stage_rank(rank), scene_of(config))
    return {phase: one.device for phase, one in found.items()}


def even(biased_BTE: torch.Tensor, rule: routing.RoutingRule) -> torch.Tensor:
    """Replaces the router's choice: the tokens take the experts in turn."""
    B, T, E = biased_BTE.shape
    first_T = torch.arange(B * T, device=biased_BTE.device) * rule.top_k
    return ((first_T[:, None] + torch.arange(rule.top_k, device=biased_BTE.device)) % E).view(B, T, -1)


def run_rank(rank: int, store: str, overrides: list[str], world: int, results) -> None:
    """Body of one rank's process."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)  # as train.rank does
    routing.choose_experts = even
    dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=rank, world_size=world)
    results.put((rank, measure(compose(*overrides), rank, Path(store))))
    dist.barrier()
    dist.destroy_process_group()


def run(overrides: list[str]) -> dict[int, dict[str, int]]:
    """Runs all ranks. Returns the measurements of each rank."""
    config = compose(*overrides)
    world = config.parallel.world
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.pipelining"])
    results = context.Queue()
    with tempfile.TemporaryDirectory() as store:
        ranks = [
            context.Process(target=run_rank, args=(rank, store, overrides, world, results), daemon=True)
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        found = dict(results.get(timeout=600) for _ in ranks)
        for process in ranks:
            process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"some of: {'; '.join(CASES)}")
    options = parser.parse_args()
    if unknown := set(options.cases) - CASES.keys():
        parser.error(f"no such case: {'; '.join(unknown)}. There are: {'; '.join(CASES)}")
    for name, more in CASES.items():
        if options.cases and name not in options.cases:
            continue
        overrides = [*RUN, *ALL_SAVES, *more]
        config = compose(*overrides)
        print(name, flush=True)
        found = {rank: (planned_peaks(config, rank), got) for rank, got in run(overrides).items()}
        for phase in {phase: None for _, got in found.values() for phase in got}:
            rows = [(want[phase], got[phase], rank) for rank, (want, got) in found.items() if phase in got]
            planned, measured, rank = max(rows, key=lambda row: abs(row[0] / row[1] - 1))
            print(
                f"    {phase:12} {rank:>4} {planned / 1e6:9.3f} {measured / 1e6:9.3f} {100 * (planned / measured - 1):+6.2f} %",
                flush=True,
            )


if __name__ == "__main__":
    main()
