"""plan.calibrate=true: times the recipe's kernels on the present device, and writes the rates that plans use.

1. Kernels are timed at several sizes (timed_run.py). A fitted rate has seconds per call, operations per second and
   bytes per second.
2. If several ranks can run, kernels are also timed while all ranks run them, and so are the links between ranks.
3. One rank runs complete steps at two micro-batch sizes. Time that the rates do not explain becomes a cost per launch
   (Python, autograd) and a factor on kernel times (cold caches).

A single-threaded CPU rank is timed by processor time, which excludes other processes.
"""

import json
import os
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import multiprocessing

from conf.errors import UserError
from conf.schema import Config, Parallel, Rate
from parallel.layout import Layout
from parallel.mesh import build_mesh
from train.kernels.choice import build_kernels
from train.kernels.cpu.processor import cpu_name, threads_of, tune_cpu
from train.parallelize import parallelize
from train.plan.job import device_kind
from train.plan.time.rates import CALIBRATION_FILE, Rates
from train.plan.time.step_time import plan_time
from train.plan.time.timed_run import timed_passes, timed_rows_and_weights
from train.plan.time.timed_step import TimedStep, undisturbed_clock, wall_clock
from train.rank_parts import RankSetup

SHORTER = 4
"""Ratio of the two timed micro-batch sizes, in tokens."""
LINK_RUNS = 20
"""Number of runs of each collective, of which the shortest counts."""
LINK_BYTES = (2**14, 2**18, 2**22)
"""Sizes of the timed collectives, in bytes."""
CALIBRATION_STEPS = 8
"""Number of timed steps, of which the shortest counts."""


def calibrate(config: Config) -> Path:
    """Measure the rates and write runs/<name>/calibration.json. Returns its path."""
    device = torch.device("cuda" if config.cluster.device != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and config.precision.fp8 is not None:
        raise UserError(
            "precision.name",
            config.precision.name,
            "the planner has no rule for the FP8 emulation of CPUs",
            "calibrate with precision=bf16",
        )
    threads = threads_of(config.cluster.threads, config.parallel.world)
    ranks = torch.cuda.device_count() if device.type == "cuda" else max(1, len(os.sched_getaffinity(0)) // threads)
    found = _measure_on(ranks, config, device.type, threads)
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    content = {
        "device": name,
        "threads": threads,
        "ranks": ranks,
        "precision": config.precision.name,
        "compiled": list(build_kernels(device.type, config.cluster.compiled).parts),
        "recipe": config.name,
        "torch": torch.__version__,
        "measured": time.strftime("%Y-%m-%d %H:%M"),
        **found,
    }
    folder = Path(config.runs) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CALIBRATION_FILE).write_text(json.dumps(content, indent=1))
    return folder / CALIBRATION_FILE


def _measure_on(ranks: int, config: Config, kind: str, threads: int) -> dict[str, Any]:
    """Run the measurements in `ranks` processes and return rank 0's results."""
    barrier = multiprocessing.get_context("spawn").Barrier(ranks)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (ranks, config, kind, threads, folder, barrier), ranks)
        return json.loads(Path(folder, CALIBRATION_FILE).read_text())


def _rank(rank: int, ranks: int, config: Config, kind: str, threads: int, folder: str, barrier) -> None:
    """Run one rank's measurements. Rank 0 writes them into `folder`."""
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    tune_cpu()
    if kind == "cpu":
        torch.set_num_threads(threads)
    else:
        torch.cuda.set_device(rank)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    found: dict[str, Any] = {}
    launch = Rate()
    if rank == 0:
        found["rates_alone"], found["residues_alone"] = _all_rates(config, device)
        launch, found["factors_alone"] = _around_alone(config, device, found["rates_alone"])
        found["rates_alone"]["launch"] = vars(launch)
    barrier.wait()
    if ranks > 1:
        found["rates_together"], found["residues_together"] = _all_rates(config, device)
        barrier.wait()
        found["factors_together"] = _factors_together(config, device, found["rates_together"], launch, barrier)
        found["rates_together"]["launch"] = vars(launch)
        barrier.wait()
        found["rates_together"] |= _links(rank, ranks, device, folder)
    else:
        found |= {name.replace("alone", "together"): value for name, value in found.items()}
    if rank == 0:
        Path(folder, CALIBRATION_FILE).write_text(json.dumps(found))


def _all_rates(config: Config, device: torch.device) -> tuple[dict[str, dict], dict[str, float]]:
    """Returns the rates by kind of work, and their largest relative errors."""
    samples: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    timed = [timed_passes(_alone(config, *batch), device) for batch in batches(config)]
    for (kind, *amounts, calls), seconds in chain(*timed, timed_rows_and_weights(config, device)):
        flops, moved = (amount / calls for amount in amounts)
        samples[kind].append((flops, moved, max(seconds / calls, 1e-9)))
    fits = {kind: fit_rate(found) for kind, found in samples.items()}
    return {kind: vars(rate) for kind, (rate, _) in fits.items()}, {kind: worst for kind, (_, worst) in fits.items()}


def batches(config: Config) -> list[tuple[int, int]]:
    """Returns two micro-batches, each as number and length of sequences.

    Two sizes separate the cost per call from the cost per element.
    """
    if config.micro_batch_size < SHORTER:
        return [(config.micro_batch_size, config.seq_len), (1, -(-config.seq_len // SHORTER))]
    return [(config.micro_batch_size, config.seq_len), (config.micro_batch_size // SHORTER, config.seq_len)]


def _alone(config: Config, sequences: int, length: int) -> Config:
    """Returns the recipe for one rank, with two micro-batches per step."""
    return replace(
        config,
        parallel=Parallel(),
        seq_len=length,
        micro_batch_size=sequences,
        batch_size=2 * sequences,
        cluster=replace(config.cluster, ranks_per_node=1),
        hardware=replace(config.hardware, name="here", device="cpu" * (device_kind(config) == "cpu"), fp8_flops=1.0),
        optim=replace(config.optim, batch_ramp_start=None, batch_ramp_steps=0),
    )


def fit_rate(samples: Sequence[tuple[float, float, float]]) -> tuple[Rate, float]:
    """Fits a rate to samples (operations, bytes, seconds) of calls. Also returns the largest relative error.

    Seconds = seconds per call + operations / flops + bytes / bandwidth. The fit minimises the sum of squared relative
    errors. No term is negative.
    """
    rows_N3 = np.array([[1.0, flops, moved] for flops, moved, _ in samples])
    seconds_N = np.array([seconds for *_, seconds in samples])
    relative_N3 = rows_N3 / seconds_N[:, None]
    best, least = np.zeros(3), np.inf
    usable = [column for column in range(3) if relative_N3[:, column].any()]
    for size in range(1, len(usable) + 1):
        for columns in combinations(usable, size):
            # One call has some 1e9 operations. Without scaling, the matrix would be ill-conditioned.
            scale = relative_N3[:, columns].max(0)
            part, *_ = np.linalg.lstsq(relative_N3[:, columns] / scale, np.ones(len(samples)), rcond=None)
            error = np.square(relative_N3[:, columns] / scale @ part - 1).sum()
            if (part >= 0).all() and error < least * (1 - 1e-9):
                best, least = np.zeros(3), error
                best[list(columns)] = part / scale
    worst = float(np.abs(relative_N3 @ best - 1).max())
    call, per_flop, per_byte = best.tolist()
    return Rate(call, 1 / per_flop if per_flop else 0.0, 1 / per_byte if per_byte else 0.0), worst


def _around_alone(config: Config, device: torch.device, rates: dict[str, dict]) -> tuple[Rate, dict[str, float]]:
    """Measures the part of a rank's step time that kernel rates do not explain.

    Returns the rate of a launch, and factors on passes and update. The two timed steps differ in the size of their
    micro-batches, but not in the number of launches.
    """
    steps = [_Step(config, *batch, rates, device) for batch in batches(config)]
    first, second = steps
    factor = (first.passes - second.passes) / (first.kernels - second.kernels)
    launch = (first.passes - factor * first.kernels) / first.launches
    if factor <= 0 or launch < 0:  # the device hides launches, or the times are noisy
        factor, launch = first.passes / first.kernels, 0.0
    return Rate(seconds=launch), {"passes": factor, "update": first.update}


def _factors_together(
    config: Config, device: torch.device, rates: dict[str, dict], launch: Rate, barrier
) -> dict[str, float]:
    """Returns the factors on kernel times while all ranks are active.

    launch: rate of a launch, measured with one active rank. This rate does not change, because each rank has its own
        core.
    """
    step = _Step(config, *batches(config)[0], rates, device, barrier)
    return {"passes": (step.passes - launch.seconds * step.launches) / step.kernels, "update": step.update}


class _Step:
    """Measured times of one rank's step, and its kernels' planned time."""

    def __init__(self, config: Config, sequences: int, length: int, rates: dict[str, dict], device, barrier=None):
        alone = _alone(config, sequences, length)
        known = {kind: Rate(**rate) for kind, rate in rates.items() if kind != "launch"}
        plan = plan_time(alone, Rates(known, "this device"))
        self.kernels = plan.pipeline_seconds
        self.launches = plan_time(alone, Rates(dict.fromkeys(known, Rate(seconds=1.0)), "calls")).pipeline_seconds
        """Number of kernel launches in the passes of a step."""
        self.passes, updated = _step(alone, device, barrier)
        self.update = updated / plan.update.seconds
        """Measured time of the update divided by its planned time."""


def _step(config: Config, device: torch.device, barrier) -> tuple[float, float]:
    """Runs steps on one rank. Returns the shortest seconds of passes, and of reduction plus update."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        kernels = build_kernels(device.type, config.cluster.compiled)
        mesh = build_mesh(Layout())
        parts = parallelize(config, mesh, device, kernels)
        timed = TimedStep(config, parts, RankSetup(device, mesh), undisturbed_clock)
        times = []
        for number in range(1, CALIBRATION_STEPS + 1):
            if barrier is not None:
                barrier.wait()
            times.append(timed.run(number)[1])
        return min(each["schedule"] for each in times), min(each["reduction"] + each["update"] for each in times)
    finally:
        dist.destroy_process_group()


def _links(rank: int, ranks: int, device: torch.device, folder: str) -> dict[str, dict]:
    """Returns the rates of transfers between this machine's ranks."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    samples: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for size in LINK_BYTES:
        mine, all_of_it = torch.ones(size // 4, device=device), torch.ones(size // 4 * ranks, device=device)
        received = torch.empty_like(all_of_it)
        others = (ranks - 1) / ranks
        for name, moved, run in (
            ("all_to_all", others * size * ranks, lambda a=all_of_it, b=received: dist.all_to_all_single(b, a)),
            ("reduce", 2 * others * size, lambda a=mine: dist.all_reduce(a)),
            ("gather", others * size * ranks, lambda a=mine, b=received: dist.all_gather_into_tensor(b, a)),
            ("send", size, lambda a=mine: _shift(a, rank, ranks)),
        ):
            samples[f"{name}_inside"].append((0.0, moved, _seconds_in_step(run, device)))
    dist.destroy_process_group()
    return {kind: vars(fit_rate(found)[0]) for kind, found in samples.items()}


def _shift(tensor: torch.Tensor, rank: int, ranks: int) -> None:
    """Send to the next rank, and receive from the previous rank."""
    received = torch.empty_like(tensor)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, tensor, (rank + 1) % ranks),
            dist.P2POp(dist.irecv, received, (rank - 1) % ranks),
        ]
    )
    for one in works:
        one.wait()


def _seconds_in_step(run: Callable[[], object], device: torch.device) -> float:
    """Returns the shortest seconds of a collective. All ranks start together."""
    times = []
    for _ in range(LINK_RUNS):
        dist.barrier()
        started = wall_clock(device)
        run()
        times.append(wall_clock(device) - started)
    return min(times)
