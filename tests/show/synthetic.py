"""Run folders with numbers that look like a training run, without the training."""

import math
from pathlib import Path

import numpy as np

from conf.load import compose, write_config
from train.metrics.balance import balance_record, update_running
from train.metrics.jsonl import JsonlSink
from train.metrics.timeline_file import SampledStep, write_timeline


def write_run(
    folder: Path,
    steps: int,
    *,
    layers: int = 4,
    experts: int = 16,
    depth: int = 1,
    nan_at: tuple[int, ...] = (),
    overrides: tuple[str, ...] = (),
    pipeline: int = 1,
) -> Path:
    """config.yaml and metrics.jsonl of `steps` steps of 4096 tokens; `layers` MoE layers, MTP included.

    pipeline: ranks of a pipeline with experts on several nodes, timeline.json included.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_config(compose(f"steps={steps}", *overrides), str(folder / "config.yaml"))
    generator = np.random.default_rng(0)
    names = [f"layers.{i + 1}" for i in range(layers - min(layers, depth))] + [
        f"mtp.{i}" for i in range(min(layers, depth))
    ]
    skew_LE, bias_LE, running, skipped = generator.normal(size=(layers, experts)), np.zeros((layers, experts)), None, 0
    sink = JsonlSink(folder / "metrics.jsonl", 0, print)
    for step in range(1, steps + 1):
        x = step / steps
        main = 2.5 + 6 * math.exp(-6 * x) + generator.normal() * 0.05
        bad = step in nan_at
        skipped += bad
        seconds = 0.2 + 0.02 * generator.random()
        record = {
            "step": step,
            "tokens": step * 4096,
            "samples": step * 16,
            "epochs": step * 4096 / 1e6,
            "loss": math.nan if bad else main + 0.3 * (main + 0.4),
            "main_loss": math.nan if bad else main,
            "balance_loss": 1e-4,
            "grad_norm": math.inf if bad else 0.8 * math.exp(generator.normal() * 0.3),
            "lr": 1e-3 * min(1, step / 20),
            "mtp_weight": 0.3,
            "bias_speed": 0.001,
            "batch_size": 16,
            "tokens_per_second": 4096 / seconds,
            "mfu": 0.2 * 0.2 / seconds,
            "mfu_full": 0.22 * 0.2 / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": 0.002 * generator.random(),
            "checkpoint_stall_seconds": 0.5 if step % max(1, steps // 5) == 0 else 0.0,
            "memory_bytes": int(9e8 + 1e8 * (1 - math.exp(-step / 5))),
            "skipped_steps": skipped,
            "time": 1.8e9 + 0.22 * step,
        }
        if depth:
            record["mtp_loss"] = math.nan if bad else main + 0.4
            record |= {f"mtp_loss_{k + 1}": main + 0.4 + k * 0.2 for k in range(depth)} if depth > 1 else {}
        if step % max(1, steps // 10) == 0 or step == steps:
            record |= {"validation_loss": main + 0.15, "validation_bits_per_byte": (main + 0.15) / math.log(2) / 3.5}
        if layers and (step <= 2000 or step % (steps // 500) == 0):
            share_LE = np.exp(skew_LE * (0.1 + math.exp(-4 * x)))
            share_LE /= share_LE.sum(axis=1, keepdims=True)
            counts_LE = np.array([generator.multinomial(16384, row) for row in share_LE])
            running = update_running(running, counts_LE)
            bias_LE = bias_LE + 0.001 * np.sign(counts_LE.mean(axis=1, keepdims=True) - counts_LE)
            record |= balance_record(names, counts_LE, bias_LE, running)
        if pipeline > 1:
            record |= {
                "bubble_share": 0.2,
                "forward_seconds": 0.05,
                "backward_seconds": 0.09,
                "overlapped_seconds": 0.0,
            }
            record |= {"dispatch_bytes_inside": 2**24, "dispatch_bytes_across": 2**22, "dispatch_wait_seconds": 0.01}
        sink.write(record)
    sink.close()
    if pipeline > 1:
        write_timeline(folder, sampled_step(steps, pipeline, 2 * pipeline))
    return folder


def sampled_step(step: int, ranks: int, micro_batches: int) -> SampledStep:
    """A pipeline of one stage per rank: all micro-batches forward, then all backward."""
    actions = []
    for rank in range(ranks):
        for number in range(micro_batches):
            backward_start = 0.01 * (micro_batches + ranks + 2 * (ranks - 1 - rank) + 2 * number)
            for kind, start, seconds in (("F", 0.01 * (rank + number), 0.01), ("B", backward_start, 0.02)):
                where = {"rank": rank, "pp_rank": rank, "stage": rank, "kind": kind, "micro_batch": number}
                actions.append(where | {"start_seconds": start, "seconds": seconds})
    return SampledStep(step, "1f1b", [0.03 * (micro_batches + ranks)] * ranks, actions)
