"""Pipeline schedules with compute replaced by sleeps of known length: measured idle time beside the simulator and formulas.

    python -m bench.schedules [--pp 4] [--micro-batches 16] [--steps 3] [--forward 40] [--inputs 40] [--weights 40]

Every stage sleeps `forward` ms in F, and `inputs` and `weights` ms in the two parts of its backward (B sleeps both);
a pair FB of dualpipev sleeps one after the other. Sleeping ranks need no core, so a laptop stands for 8 of them. For
schedules with two stages a rank, each stage holds half of a rank's layers and sleeps half as long, so that all rows
are the same model on the same ranks. Transfers are gloo's, between processes of this machine, and small.

Columns, all of the fastest of `--steps` steps (the first one not counted), since other work on the machine only ever
adds time: idle milliseconds of the rank that idles most, from the closed form in parallel/pipeline/simulate.py, from the
simulator on torch's action list, and measured; the bubble, the idle share of all ranks' time, simulated and
measured, and their ratio; and `replayed`, the bubble that the simulator finds with the lengths that the actions really
had: what lies between it and `measured` is transfers and waking up. Stage 0 of torch's split backward does nothing in I and
everything in W, and the simulation does the same.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.pipeline.schedule import Pipeline
from parallel.pipeline.simulate import Action, idle_time, schedule_actions, simulate
from parallel.pipeline.split import SCHEDULES, stage_placement
from parallel.pipeline.timeline import StepRecord
from train.model.needed import gradients_needed

HIDDEN, SEQ = 4, 2


class Sleep(torch.autograd.Function):
    """Identity in x; its backward sleeps `inputs` for x's gradient and `weights` for the weight's."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, seconds: tuple[float, float, float]) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds[0])
        return x + 0 * weight

    @staticmethod
    def backward(ctx, grad: Tensor):
        needs_x, needs_weight, _ = gradients_needed(ctx)
        time.sleep((ctx.seconds[1] if needs_x else 0.0) + (ctx.seconds[2] if needs_weight else 0.0))
        return (grad if needs_x else None), (grad.sum().reshape(1) if needs_weight else None), None


class SleepChunk(nn.Module):
    """One stage of nothing but time."""

    def __init__(self, seconds: tuple[float, float, float], first: bool, last: bool):
        super().__init__()
        self.weight, self.seconds, self.first, self.last = nn.Parameter(torch.zeros(1)), seconds, first, last

    def forward(self, x: Tensor, *, tokens_BS: Tensor) -> Tensor:
        if self.first:  # requires grad, so that stage 0 has an input gradient to sleep for, like any other
            x = torch.zeros(len(tokens_BS), SEQ, HIDDEN, requires_grad=True)
        x = Sleep.apply(x, self.weight, self.seconds)
        return x.mean().reshape(1) if self.last else x


def measure(rank: int, folder: str, results, pp: int, micro_batches: int, steps: int, lengths: dict) -> None:
    """Body of one rank: every schedule in turn; puts (schedule, rank, StepRecord of every step)."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=pp)
    for name in SCHEDULES:
        placement, stages = stage_placement(name, pp), pp * SCHEDULES[name]
        chunks = [SleepChunk(lengths[name], stage == 0, stage == stages - 1) for stage in placement[rank]]
        device = torch.device("cpu")
        pipeline = Pipeline(name, chunks, placement[rank], stages, None, device, hidden=HIDDEN, dtype=torch.float32)
        tokens_BS = torch.zeros(micro_batches, SEQ + 1, dtype=torch.int64)
        records = []
        for _ in range(steps + 1):
            dist.barrier()
            pipeline.step(tokens_BS, micro_batches=micro_batches)
            records.append(pipeline.timeline.newest())
        results.put((name, rank, records[1:]))
    dist.barrier()
    dist.destroy_process_group()


def durations(seconds: tuple[float, float, float]) -> Callable[[Action], float]:
    """Length of every action, as the sleeping stages take them."""
    forward, inputs, weights = seconds
    split = {"F": forward, "B": inputs + weights, "I": inputs, "W": weights, "FB": forward + inputs + weights}

    def duration(action: Action) -> float:
        if action.stage == 0 and action.kind in "IW":
            return 0.0 if action.kind == "I" else inputs + weights
        return split[action.kind]

    return duration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pp", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    for part in ("forward", "inputs", "weights"):
        parser.add_argument(f"--{part}", type=float, default=40.0, help="milliseconds a rank and micro-batch")
    args = parser.parse_args()
    whole = tuple(x / 1000 for x in (args.forward, args.inputs, args.weights))
    lengths = {name: tuple(x / count for x in whole) for name, count in SCHEDULES.items()}
    found = run_ranks(measure, args.pp, len(SCHEDULES), args.pp, args.micro_batches, args.steps, lengths)
    measured = {(name, rank): records for name, rank, records in found}
    print(
        f"pp={args.pp}, {args.micro_batches} micro-batches, F={args.forward} I={args.inputs} W={args.weights} ms a rank"
    )
    print("schedule     idle ms: formula  simulated  measured | bubble: simulated  measured  ratio  replayed | step ms")
    for name in SCHEDULES:
        actions = schedule_actions(name, args.pp, args.micro_batches)
        plan = simulate(actions, durations(lengths[name]))
        f, i, w = lengths[name]
        formula = idle_time(name, args.pp, f, i, w, f + i + w)
        steps = zip(*(measured[name, rank] for rank in range(args.pp)), strict=True)
        ranks = min(steps, key=lambda step: max(record.span for record in step))
        span, bubble = _bubble(ranks)
        idle = span - min(record.busy for record in ranks)
        took = {(a.kind, a.stage, a.micro_batch): a.seconds for record in ranks for a in record.actions}
        replayed = simulate(actions, lambda action, took=took: took[action[:3]])
        print(
            f"{name:12} {1e3 * formula:16.1f} {1e3 * (plan.makespan - min(plan.busy)):10.1f} {1e3 * idle:9.1f} |"
            f" {plan.bubble:17.4f} {bubble:9.4f} {bubble / plan.bubble:6.3f} {replayed.bubble:9.4f} | {1e3 * span:7.1f}"
        )


def _bubble(ranks: Sequence[StepRecord]) -> tuple[float, float]:
    """Seconds of the step and idle share of all ranks' time."""
    span = max(record.span for record in ranks)
    return span, statistics.mean(record.bubble(span) for record in ranks)


def run_ranks(body: Callable[..., None], pp: int, answers: int, *arguments) -> list:
    """What body(rank, folder, queue, *arguments) of every rank puts into the queue, `answers` each. folder: for their store."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.pipelining"])
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=body, args=(rank, folder, results, *arguments)) for rank in range(pp)]
        for process in ranks:
            process.start()
        found = [results.get(timeout=300) for _ in range(pp * answers)]
        for process in ranks:
            process.join()
    return found


if __name__ == "__main__":
    main()
