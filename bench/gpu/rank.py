"""A rank that takes a few whole steps of a recipe and writes its results, as one process of a comparison.

    python -m bench.gpu.rank TASK OUT        with RANK, WORLD_SIZE and, for several ranks, BENCH_STORE in the
    environment

The step is the trainer's own: pipeline, DeepSpeed's engine, AdamW. Every layout gets the same random tokens for a step,
drawn for the whole batch. OUT gets the losses of every step (from ranks with the head), gradient norms and, on request,
the gradients and the update of the fp32 weights in the first step.
"""

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from bench.gpu.words import last_words
from conf.schema import ROOT

LEARNING_RATE = 1e-3
POLL = 0.1
"""Seconds between two looks at the processes."""
WAIT = 120.0
"""Longest wait in a collective, seconds."""


@dataclass(frozen=True)
class Task:
    """What the ranks do."""

    overrides: tuple[str, ...]
    device: str
    steps: int = 1
    tensors: bool = False
    """Whether gradients and updates are written; for one rank."""
    compiled: bool = True
    """Whether a CPU runs compiled code."""
    ranks: int = 1
    backend: str = ""
    """Of several ranks: what init_process_group takes."""
    links: bool = False
    """Whether the links between the ranks are tried, and nothing else done."""
    threads: int = 0
    """Of a rank on a CPU; 0 for its share."""


class Ranks:
    """The processes of a task. RuntimeError, with the last words of the first to fail, where they find nothing."""

    def __init__(self, task: Task, folder: Path):
        self._folder = folder
        folder.mkdir(parents=True)
        shared = os.environ | {
            "WORLD_SIZE": str(task.ranks), "LOCAL_WORLD_SIZE": str(task.ranks), "GLOO_SOCKET_IFNAME": "lo",
            "BENCH_STORE": f"file://{folder}/store",
        }  # fmt: skip
        self._processes = []
        for rank in range(task.ranks):
            command = [sys.executable, "-m", "bench.gpu.rank", json.dumps(asdict(task)), str(folder / f"{rank}.pt")]
            with (folder / f"{rank}.errors").open("w") as errors:
                self._processes.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=shared | {"RANK": str(rank)}, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors
                    )
                )  # fmt: skip

    def found(self, seconds: float) -> list[dict]:
        """What every rank wrote; all have ended. One that fails ends the others, which would wait for it."""
        import torch

        deadline = time.monotonic() + seconds
        try:
            codes: list[int | None] = [None]
            while None in codes and not any(codes) and time.monotonic() < deadline:
                time.sleep(POLL)
                codes = [process.poll() for process in self._processes]
        finally:
            for process in self._processes:
                process.kill()
                process.wait()
        if any(codes):
            rank = next(rank for rank, code in enumerate(codes) if code)
            raise RuntimeError(f"rank {rank}: {last_words(codes[rank], self._said(rank))}")
        if None in codes:
            rank = codes.index(None)
            said = self._said(rank).strip().splitlines()[-1:]
            raise RuntimeError(f"rank {rank} had no end within {seconds:.0f} s: {' '.join(said)}")
        return [torch.load(self._folder / f"{rank}.pt") for rank in range(len(self._processes))]

    def _said(self, rank: int) -> str:
        return (self._folder / f"{rank}.errors").read_text(errors="replace")


def run_ranks(task: Task, folder: Path, seconds: float) -> list[dict]:
    """One task alone."""
    return Ranks(task, folder).found(seconds)


def losses(found: Sequence[dict]) -> list[float]:
    """Of every step, the mean over the ranks that have the head."""
    each = [one["losses"] for one in found if one["losses"]]
    return [sum(at) / len(at) for at in zip(*each, strict=True)]


def main() -> None:
    words, out = sys.argv[1:]
    task = Task(**json.loads(words))
    from train.kernels.cpu.processor import tune_cpu

    tune_cpu()
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    import torch

    torch.save(take_steps(task, int(os.environ["RANK"])), out)


def take_steps(task: Task, rank: int) -> dict:
    import torch
    import torch.distributed as dist

    from bench.gpu.machine import kernels_of
    from cluster.place import Place
    from conf.load import compose
    from parallel.links import try_links
    from parallel.mesh import build_mesh
    from train import parallelize as parallelize_module
    from train.loop.training_engine import Engine
    from train.optim.schedules import StepPlan
    from train.plan.job import layout_of
    from train.rank import choose_device, start_process_group
    from train.rank_parts import RankSetup

    more = [] if task.compiled else ["cluster.compiled=false"]
    config = compose(*task.overrides, f"cluster.device={task.device}", f"cluster.threads={task.threads}", *more)
    place = Place(rank, task.ranks, rank if "nccl" in task.backend else 0, task.ranks)  # else one card for all of them
    device = choose_device(config, place)
    if task.ranks == 1:
        start_process_group(config, Place(), device)
    else:
        if "staged" in task.backend:
            from bench.gpu import staged

            staged.register()
        store = os.environ["BENCH_STORE"]
        dist.init_process_group(task.backend, store, timedelta(seconds=WAIT), task.ranks, rank)
    mesh = build_mesh(layout_of(config), timedelta(seconds=WAIT))
    if task.links:
        names, found = try_links(mesh, config.parallel.dispatch_facts, task.ranks, device)
        dist.destroy_process_group()
        return {"names": names, "links": [tuple(vars(one).values()) for one in found]}
    parallelize_module.initialise = drawn_by_the_cpu
    parts = parallelize_module.parallelize(config, mesh, device, kernels_of(config, device))
    engine = Engine(config, parts, RankSetup(device, mesh))
    share = config.batch_size // config.parallel.dp
    found: dict = {"losses": [], "norms": []}
    for step in range(task.steps):
        draw = torch.Generator().manual_seed(step + 1)
        tokens_BS = torch.randint(config.model.vocab_size, (config.batch_size, config.seq_len + 1), generator=draw)
        mine_BS = tokens_BS[mesh.dp_rank * share : (mesh.dp_rank + 1) * share].to(device)
        plan = StepPlan(step + 1, 0, config.batch_size, LEARNING_RATE, config.optim.mtp_weight[0].value, bias_speed=0.0)
        found |= one_step(engine, parts, plan, mine_BS, task.tensors and step == 0)
        head = next((chunk for chunk in parts.chunks if chunk.has_head), None)
        if head is not None:
            found["losses"].append(head.losses.means()[0].item())
        found["norms"].append(found.pop("norm"))
    dist.destroy_process_group()
    return found


def drawn_by_the_cpu(chunk, seed: int, device) -> None:
    """The initial weights of a CPU on any device: sides that are compared have to start from the same."""
    from train.model.init import initialise

    chunk.to("cpu")
    initialise(chunk, seed, "cpu")
    chunk.to(device)


def one_step(engine, parts, plan, tokens_BS, tensors: bool) -> dict:
    """The gradient norm, and with tensors the gradients and what the update added."""
    from train.data.batch import Batch

    found = {}
    if tensors:
        before = {name: shard.local.clone() for name, shard in _masters(parts)}

    def keep(phase: str) -> None:
        if tensors and phase == "schedule":
            # copies, since the update may multiply gradients where they lie
            found["gradients"] = {name: param.grad.clone().cpu() for param, name in parts.zero.names.items()}

    found["norm"] = engine.run(plan, Batch(tokens_BS), on_phase=keep).update.grad_norm
    if tensors:
        found["updates"] = {name: (shard.local - before[name]).cpu() for name, shard in _masters(parts)}
    return found


def _masters(parts):
    return [(name, shard) for name, shard in parts.zero.shards().items() if name.startswith("master.")]


if __name__ == "__main__":
    main()
