"""Fills a step's record for metrics.jsonl: losses, rates, and the balance of the routers.

Other hooks add more values to the record, and `Recorder` writes the record.
"""

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from conf.schema import Config
from parallel.exchange import gather
from train.kernels.fp8.health import Report, merge_reports
from train.loop.hooks.rank_progress import peak_memory
from train.loop.live_run import LiveRun
from train.metrics.balance import balance_record
from train.metrics.names import Record
from train.show.wandb_sink import checkpoint


@dataclass
class Flops:
    """FLOPs per token and the device's peak rate, from which MFU is computed."""

    causal: float
    """FLOPs per token, with causal attention."""
    full: float
    """FLOPs per token, with attention counted as if it were not causal."""
    peak: float
    """Peak FLOP/s of one rank's device."""
    label: str
    """Describes the source of the device's peak FLOP/s."""


class StepMetrics:
    """Adds the step's losses, settings, tokens per expert and speed (without validation and saving) to the record."""

    def __init__(self, flops: Flops):
        self._flops = flops

    def on_step(self, run: LiveRun, step: int, record: Record) -> None:
        plan, measured, state = run.plan, run.outcome.measured, run.state
        depth = max(1, len(measured.mtp_losses))
        mtp_loss = sum(measured.mtp_losses) / depth
        record |= {
            "tokens": state.samples * run.config.seq_len,
            "samples": state.samples,
            "epochs": max(run.data.train.epochs(state.samples).values()),
            "loss": measured.main_loss
            + plan.mtp_weight * mtp_loss
            + measured.extra_loss
            + measured.balance_loss
            + measured.index_loss,
            "main_loss": measured.main_loss,
            "balance_loss": measured.balance_loss,
            "grad_norm": run.outcome.update.grad_norm,
            "lr": plan.lr,
            "mtp_weight": plan.mtp_weight,
            "bias_speed": plan.bias_speed,
            "batch_size": plan.batch_size,
            "skipped_steps": state.skipped,
        }
        if measured.mtp_losses:
            record["mtp_loss"] = mtp_loss
        if len(measured.mtp_losses) > 1:
            record |= {f"mtp_loss_{k}": loss for k, loss in enumerate(measured.mtp_losses, 1)}
        if run.config.model.sparse.heads:
            record["index_loss"] = measured.index_loss
        if run.config.optim.extra_loss:
            record["extra_loss"] = measured.extra_loss
        if measured.scores_L:
            record |= {"attention_score_max": max(measured.scores_L), "heads_clipped": measured.heads_clipped}
        running = state.record_loads(measured.loads_LE)
        layers = run.engine.measure.layers
        record |= measured.work | balance_record(layers, measured.loads_LE, measured.biases_LE, running)
        run.seconds = time.perf_counter() - run.started
        record |= self._speed(run, run.seconds)

    def _speed(self, run: LiveRun, seconds: float) -> Record:
        rate = run.plan.batch_size * run.config.seq_len / seconds
        peak = self._flops.peak * run.mesh.layout.world
        return {
            "step_seconds": seconds,
            "tokens_per_second": rate,
            "mfu": rate * self._flops.causal / peak,
            "mfu_full": rate * self._flops.full / peak,
            "peak_flops": self._flops.peak,
        }


class Fp8Readings:
    """precision.fp8.health: records the worst result of each FP8 check over all ranks, and warns about results beyond
    the limit.

    The hook reads the results every `precision.fp8.health.every` steps.
    """

    def __init__(self, config: Config):
        fp8 = config.precision.fp8
        self._every = 0 if fp8 is None else fp8.health.every

    def on_step(self, run: LiveRun, step: int, record: Record) -> None:
        if not self._every or step % self._every:
            return
        reports = gather(asdict(run.parts.precision.health()))
        together = merge_reports([Report(**report) for report in reports])
        for warning in together.warnings:
            run.note(warning)
        record |= together.metrics | together.layers


SETTLED = 2
"""Number of steps after which every tensor shape has occurred, so that all kernels are compiled."""


class Recorder:
    """Sends each step's record to metrics.jsonl, the terminal and W&B, and complete checkpoints to W&B. Only rank 0
    sends."""

    def __init__(self) -> None:
        self._steps = self._compiled = 0

    def on_step(self, run: LiveRun, step: int, record: Record) -> None:
        if run.writer is None:
            return
        rest = {
            "checkpoint_stall_seconds": run.saver.stall,
            "memory_bytes": peak_memory(run.device),
            "time": time.time(),
        }
        if (kernels := sys.modules.get("parallel.triton_types")) is not None:  # imported only after a kernel launch
            self._steps += 1
            if self._steps <= SETTLED:
                self._compiled = len(kernels.COMPILED)
            rest["kernels_compiled"] = len(kernels.COMPILED) - self._compiled
        if run.writer.write(record | rest):
            run.saver.stall = 0.0  # otherwise the next record would include this stall

    def on_checkpoint(self, run: LiveRun, step: int, path: Path) -> None:
        if run.writer is not None:
            run.writer.show(checkpoint(step, path))
