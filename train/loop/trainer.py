"""The loop: one optimizer step after another, on every rank alike.

For each: read this rank's share of the batch, make the step (step.py), name it if it was skipped, record, validate and save
when due. The logging rank is rank 0 and the only one with a writer.
"""

import math
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from cluster.comm_ring import CommRing
from cluster.run_files import step_name
from conf.changed_settings import settings_of
from conf.disk import disk_errors
from conf.errors import EXIT_DIVERGED, EXIT_OK, EXIT_STOPPED, DiskFailed, RunEnded
from conf.micro_batches import share_of
from conf.run_paths import RunPaths
from conf.schema import Config
from conf.words import say
from parallel.exchange import gather
from train.checkpoint.checkpointer import Checkpointer, SaveResult
from train.checkpoint.memory_copies import MemoryCopies
from train.checkpoint.run_folder import write_best
from train.data.batch import Batch
from train.data.prefetch import Prefetch
from train.data.prepare import PreparedData
from train.data.streamed import StreamedData
from train.kernels.fp8.health import Report, merge_reports
from train.loop.callbacks import Callbacks, RunView
from train.loop.layer_norms import LayerNorms
from train.loop.measure import MeasuredStep
from train.loop.nonfinite import SHOWN_TENSORS, Origin, RankSightings, Watch, bad_weights, find_origin
from train.loop.profiler import StepProfiler
from train.loop.published_weights import publish_weights
from train.loop.rank_progress import RankProgress, peak_memory
from train.loop.replicas import ReplicaCheck, StateCheck
from train.loop.state import RunState
from train.loop.step import TrainingStep
from train.loop.stop import StopKind, StopRequest
from train.loop.timeline_sampler import TimelineSampler
from train.loop.validation import held_out_loss
from train.loop.written_text import sample
from train.metrics.balance import balance_record
from train.metrics.screens import quoted_lines
from train.metrics.wandb_items import checkpoint, sample_table
from train.metrics.writer import MetricsWriter
from train.optim.schedules import Schedules, StepPlan
from train.rank_parts import ParallelModel, RankSetup

NEXT_PHASE = {"schedule": "reduction", "reduction": "update", "update": "record"}
"""What a step is at after each of its phases."""


class RunDiverged(RunEnded):
    """Too many steps in a row had a non-finite loss or gradient."""

    code = EXIT_DIVERGED


class RunOvertaken(RunEnded):
    """A newer attempt of this run has started elsewhere; this one must not go on."""


@dataclass
class Flops:
    """What MFU needs."""

    causal: float
    """Per token."""
    full: float
    """Per token, with attention counted as if it were not causal."""
    peak: float
    """FLOP/s of one rank's device."""
    label: str
    """Where the peak comes from, for a person."""


@dataclass
class Outputs:
    """What a rank of a run writes to."""

    checkpointer: Checkpointer
    copies: MemoryCopies | None
    """In the memory of the nodes; None for a run that keeps none."""
    writer: MetricsWriter | None
    """The writer of metrics, on rank 0; None on the others."""


class Trainer:
    """One rank of a run: parts and state are trained on data, until the last step or a request to stop."""

    def __init__(
        self,
        *,
        config: Config,
        rank: RankSetup,
        parts: ParallelModel,
        state: RunState,
        data: PreparedData,
        outputs: Outputs,
        flops: Flops,
        stop: StopRequest,
        ring: CommRing | None = None,
    ):
        """ring: what this rank is at is written there."""
        self.ring = ring
        self.config, self.device, self.mesh = config, rank.device, rank.mesh
        self.parts, self.state, self.data = parts, state, data
        self.checkpointer, self.copies, self.writer = outputs.checkpointer, outputs.copies, outputs.writer
        self.flops, self.stop = flops, stop
        self.rank_progress = RankProgress(RunPaths(config).logs, self.mesh.rank, self.device, self._warn)
        self.schedules = Schedules(config)
        self.training_step = TrainingStep(config, parts, rank)
        self.measure = self.training_step.measure
        self.norms = LayerNorms(config, parts.zero, self.device)
        self.replicas = ReplicaCheck(config.log.replicas_every, parts.zero, self.mesh)
        self.state_check = StateCheck(config.log.state_every, parts.zero, self.mesh.rank)
        self.timeline = TimelineSampler(config, self.mesh, parts.pipeline, state.step)
        self.profiler = StepProfiler(config, self.mesh.rank, parts, RunPaths(config).path, self._warn)
        self.callbacks = Callbacks(config, RunView(self.mesh.rank, RunPaths(config).path, parts.chunks))
        self._settings = settings_of(config)
        self.goes_on = False
        """It stopped for another attempt, which takes its state from memory."""
        self._bad_in_a_row = 0
        self._busy: float | None = None
        """Seconds of this rank's own forward and backward in the step before; a straggler has more than the others."""
        self._seconds: float | None = None
        """Seconds of that whole step."""
        self._stall = 0.0
        """Seconds that the training waited for a checkpoint since the last record."""
        if state.best is not None:
            self.checkpointer.keep_best(state.best[0])

    def run(self) -> int:
        """Train from the state's step to the last; returns the exit code. Raises RunDiverged, DiskFailed."""
        with disk_errors(self.config, kind=DiskFailed), closing(self.profiler):
            code = self._run()
        self._tell_callbacks("on_end", code)
        return code

    def _run(self) -> int:
        steps = range(self.state.step + 1, self.config.steps + 1)
        if not steps:
            self._note(f"this run has all its {self.config.steps} steps behind it; raise steps= to train on")
            if not (RunPaths(self.config).checkpoints / step_name(self.state.step)).exists():
                self._save(final=True)  # it came from another run's folder, perhaps in another layout
            return EXIT_OK
        # The data go on where the checkpoint ended, also when the batch size was changed since.
        shift = self.state.samples - self.schedules.samples[self.state.step]
        plans = (self.schedules.plan(step, shift) for step in steps)
        shares = (self._share(self.schedules.plan(step, shift)) for step in steps)
        with Prefetch(self.data.train.batch, shares) as batches:
            for plan in plans:
                self._say_progress("step", plan.step, plan.batch_size)
                stop = self._step(plan, batches)
                if stop is not StopKind.none:
                    self.goes_on = stop is StopKind.in_memory and self._copy_and_wait()
                    if not self.goes_on:
                        self._save(final=True)
                    return EXIT_STOPPED
        self._save(final=True)
        if self.config.checkpoint.weights_every:
            self._publish(self.state.step)
        return EXIT_OK

    def _share(self, plan: StepPlan) -> tuple[int, int]:
        """First sample and number of samples of this rank: a contiguous part of the step's batch."""
        first, count = share_of(self.config, plan.batch_size, self.mesh.dp_rank)
        return plan.first_sample + first, count

    def _step(self, plan: StepPlan, batches: Prefetch) -> StopKind:
        """One step; returns how the run was asked to stop."""
        started = time.perf_counter()
        waited = batches.waited
        self._enter("data", plan.step)
        batch = next(batches)
        self._enter("schedule")
        data_wait = batches.waited - waited
        if self.timeline.wants(plan.step):
            self.timeline.align()
        with self.profiler.step(plan.step):
            outcome = self.training_step.run(
                plan,
                batch,
                stopping=self.stop.pending,
                on_phase=lambda phase: self._end_phase(plan.step, phase),
            )
        self.state_check.note(plan.step)
        self.stop.has_stepped = True
        measured, update = outcome.measured, outcome.update
        self._busy = self.measure.step_work.busy
        if update.applied:
            self._bad_in_a_row = 0
            if self.state.ema is not None:
                self.state.ema.update()
        else:
            self._skipped(plan, batch, measured, update.bad_parameters)
        self.state.step, self.state.samples = plan.step, plan.first_sample + plan.batch_size
        for source in self.data.train.read_once(plan.first_sample, self.state.samples):
            self._note(f"step {plan.step}: all training text of {source} has been read once; from here on it repeats")
        record = self._record(plan, measured, update.grad_norm, data_wait)
        self._seconds = time.perf_counter() - started
        record |= self._speed(plan, self._seconds)
        record |= self._health(plan) | self.norms.collect(plan.step)
        if self.timeline.wants(plan.step):
            self.timeline.save(plan.step, self._note)
        every = self.config.log.validate_every
        if plan.step == self.config.steps or (every and plan.step % every == 0):
            record |= self.validate()
        self._log(record)
        self._tell_callbacks("on_step", plan.step, record)
        # After its record is written: a run that resumes here goes on with the next.
        self._save_when_due(plan.step, self._is_best(plan.step, record.get("validation_loss")))
        return measured.stop

    def _end_phase(self, step: int, phase: str) -> None:
        if phase == "schedule":
            self.replicas.require_equal(step)
        if phase == "reduction":
            self.state_check.require_unchanged()
        self._enter(NEXT_PHASE[phase])
        self.norms.keep(step, phase)

    def _enter(self, phase: str, step: int | None = None) -> None:
        if self.ring is not None:
            self.ring.enter(phase, step)

    def _is_best(self, step: int, loss: float | None) -> bool:
        """Whether the held-out loss is the least so far, in a run that keeps such a state; it then belongs to the state."""
        if not self.config.checkpoint.keep_best or loss is None or not math.isfinite(loss):
            return False
        if self.state.best is not None and loss >= self.state.best[1]:
            return False
        self.state.best = step, loss
        self.checkpointer.keep_best(step)
        if self.writer is not None:
            write_best(RunPaths(self.config).path, step, loss)
        return True

    def _save_when_due(self, step: int, best: bool) -> None:
        """In memory, on disk, both or neither; the last state is saved when the run ends."""
        saving = self.config.checkpoint
        if step == self.config.steps:
            return
        if self.copies is not None and step % saving.every_memory == 0:
            self._copy(self.copies)
        is_due = saving.every > 0 and step % saving.every == 0
        if best or is_due:
            self._save()
        if is_due and (every := self.config.log.sample_every) and step % every < saving.every:
            self._sample(step)
        if saving.weights_every and step % saving.weights_every == 0:
            self._publish(step)

    def _skipped(self, plan: StepPlan, batch: Batch, measured: MeasuredStep, bad: list[str]) -> None:
        """Count and name a step without update; too many in a row end the run."""
        self.state.skipped += 1
        self._bad_in_a_row += 1
        finite, last = math.isfinite(measured.main_loss), self._bad_in_a_row >= self.config.optim.max_bad_steps
        if self._bad_in_a_row > 1 and not last:  # the first of a row was looked at, and the last one will be
            self._note(f"step {plan.step} skipped: again a non-finite {'gradient' if finite else 'loss'}")
            return
        origin = self._find_origin(finite, batch, bad)
        self._note(f"step {plan.step} skipped: {origin.text}")
        if last:
            self.checkpointer.finish()  # a save in flight is a place to resume from
            samples = f"{plan.first_sample} to {plan.first_sample + plan.batch_size - 1}"
            if origin.alone and origin.ranks:
                samples = self._samples_of(plan, origin.ranks)
            advice = origin.advice(self.parts.zero.client.updates, samples)
            raise RunDiverged(
                f"{self._bad_in_a_row} steps in a row (optim.max_bad_steps) had a non-finite loss or gradient, the "
                f"last was step {plan.step}, {origin.text}. {advice}",
                origin.ranks,
            )

    def _find_origin(self, finite_loss: bool, batch: Batch, bad: list[str]) -> Origin:
        """Do the step once more on all ranks and watch it; weights and moments stay as they are."""
        zero, last = self.parts.zero, self.measure.last
        loss = None if last is None else bool(last.losses.means().isfinite().all())
        masters = ((name, shard.local) for name, shard in zero.shards().items() if name.startswith("master."))
        held = ((name, param) for param, name in zero.names.items() if param.numel())
        weights = bad_weights((name.removeprefix("master."), weight) for name, weight in chain(masters, held))
        with zero.accumulate(), Watch(self.parts.chunks) as watch:
            self.training_step.run_passes(batch)
        zero.step(valid=False)
        mine = RankSightings(
            self.mesh.rank, self.mesh.dp_rank, loss, sorted(bad)[:SHOWN_TENSORS], weights, watch.forward, watch.backward
        )
        return find_origin(finite_loss, [RankSightings.from_plain(plain) for plain in gather(mine.plain())])

    def _samples_of(self, plan: StepPlan, ranks: Sequence[int]) -> str:
        """The samples that these ranks read in a step."""
        replicas = sorted({self.mesh.layout.dp_rank(rank) for rank in ranks})
        shares = (share_of(self.config, plan.batch_size, replica) for replica in replicas)
        firsts = ((plan.first_sample + first, count) for first, count in shares)
        return ", ".join(f"{first} to {first + count - 1}" for first, count in firsts)

    def _record(self, plan: StepPlan, measured: MeasuredStep, grad_norm: float, data_wait: float) -> dict[str, Any]:
        depth = max(1, len(measured.mtp_losses))
        mtp_loss = sum(measured.mtp_losses) / depth
        record = {
            "step": plan.step,
            "tokens": self.state.samples * self.config.seq_len,
            "samples": self.state.samples,
            "epochs": max(self.data.train.epochs(self.state.samples).values()),
            "loss": measured.main_loss + plan.mtp_weight * mtp_loss + measured.extra_loss + measured.balance_loss,
            "main_loss": measured.main_loss,
            "balance_loss": measured.balance_loss,
            "grad_norm": grad_norm,
            "lr": plan.lr,
            "mtp_weight": plan.mtp_weight,
            "bias_speed": plan.bias_speed,
            "batch_size": plan.batch_size,
            "data_wait_seconds": data_wait,
            "skipped_steps": self.state.skipped,
        }
        if measured.mtp_losses:
            record["mtp_loss"] = mtp_loss
        if len(measured.mtp_losses) > 1:
            record |= {f"mtp_loss_{k}": loss for k, loss in enumerate(measured.mtp_losses, 1)}
        if self.config.optim.extra_loss:
            record["extra_loss"] = measured.extra_loss
        if measured.scores_L:
            record |= {"attention_score_max": max(measured.scores_L), "heads_clipped": measured.heads_clipped}
        running = self.state.record_loads(measured.loads_LE)
        return (
            record | measured.work | balance_record(self.measure.layers, measured.loads_LE, measured.biases_LE, running)
        )

    def _health(self, plan: StepPlan) -> dict[str, Any]:
        """Readings of the FP8 products in a step that is watched, the worst over all ranks; warns of limits passed."""
        fp8 = self.config.precision.fp8
        if fp8 is None or not fp8.health.every or plan.step % fp8.health.every:
            return {}
        reports = gather(asdict(self.parts.precision.health()))
        together = merge_reports([Report(**report) for report in reports])
        for warning in together.warnings:
            self._note(warning)
        return together.metrics | together.layers

    def _speed(self, plan: StepPlan, seconds: float) -> dict[str, float]:
        """Rates of the training itself, without validation and saving."""
        rate = plan.batch_size * self.config.seq_len / seconds
        peak = self.flops.peak * self.mesh.layout.world
        return {
            "step_seconds": seconds,
            "tokens_per_second": rate,
            "mfu": rate * self.flops.causal / peak,
            "mfu_full": rate * self.flops.full / peak,
            "peak_flops": self.flops.peak,
        }

    def _log(self, record: dict[str, Any]) -> None:
        if self.writer is None:
            return
        rest = {
            "checkpoint_stall_seconds": self._stall,
            "memory_bytes": peak_memory(self.device),
            "time": time.time(),
        }
        if self.writer.write(record | rest):
            self._stall = 0.0  # else the next record tells of it

    def validate(self) -> dict[str, float]:
        """Main loss on held-out sequences."""
        self._event("validation")
        found = held_out_loss(
            self.parts.pipeline, self.data.validation, self.mesh, self.config.micro_batch_size, self.device
        )
        self._event(None)
        return {"validation_loss": found.loss, "validation_bits_per_byte": found.bits_per_byte}

    def _copy(self, copies: MemoryCopies) -> None:
        """Keep the state in the memory of this node and the next."""
        self.state_check.require_unchanged()
        self._event("checkpoint")
        self._stall += copies.save(self.state.step, self.state.shards(), self._meta())
        for warning in copies.poll():
            self._warn(warning)
        self._event(None)

    def _copy_and_wait(self) -> bool:
        """Have the state in memory; returns whether it is there, whole. A checkpoint on its way to the disk gets there first."""
        if self.copies is None:
            return False
        self.state_check.require_unchanged()
        self._event("checkpoint")
        self.checkpointer.finish()
        whole = self.copies.save_and_wait(self.state.step, self.state.shards(), self._meta())
        for warning in self.copies.poll():
            self._warn(warning)
        self._event(None)
        return whole

    def _meta(self) -> dict[str, Any]:
        """What is saved beside the tensors."""
        data = self.data.train
        stream = {"stream": data.mark(self.state.samples)} if isinstance(data, StreamedData) else {}
        return (self.state.meta() | stream) | {
            "name": self.config.name,
            "tokenizer": self.data.tokenizer.fingerprint,
            "data": self.data.fingerprint,
            "held_out": self.data.held_out,
            "seed": self.config.seed,
            "seq_len": self.config.seq_len,
            "config": self._settings,
        }

    def _save(self, final: bool = False) -> None:
        self.state_check.require_unchanged()
        self._event("checkpoint")
        self._stall += self.checkpointer.save(self.state.step, self.state.shards(), self._meta())
        self._tell_of(self.checkpointer.finish(required=True) if final else self.checkpointer.poll())
        self._event(None)

    def _sample(self, step: int) -> None:
        """What the checkpoint of this step writes, told by rank 0 once the checkpoint is there. The other ranks meet it in the next step."""
        if self.writer is None:
            return
        self._event("checkpoint")
        self._tell_of(self.checkpointer.finish())
        self._event("validation")
        text = sample(self.config, self.data.tokenizer, self.device)
        if text is not None:
            self.writer.show(sample_table(step, text))
            self._note("\n".join([f"after step {step} the model writes", *quoted_lines(text, "  ")]))
        self._event(None)

    def _publish(self, step: int) -> None:
        """Weights of this step's checkpoint for others, by rank 0 once the checkpoint is there. The other ranks meet it in the next step."""
        if self.writer is None:
            return
        self._event("checkpoint")
        self._tell_of(self.checkpointer.finish())
        if (RunPaths(self.config).checkpoints / step_name(step)).exists():  # else it is told why not
            publish_weights(self.config, step)
        self._event(None)

    def _tell_of(self, results: Sequence[SaveResult]) -> None:
        """Let the terminal and W&B know of checkpoints, or of why there are none."""
        for result in results:
            if result.fenced:
                raise RunOvertaken(result.warning or "a newer attempt of this run has started")
            if result.warning:
                self._warn(result.warning)
            if self.writer is not None and result.path is not None:
                self.writer.show(checkpoint(result.step, result.path))
            elif self.writer is not None:
                self.writer.alert("a checkpoint is not written", result.warning or "")
            if result.path is not None:
                self._tell_callbacks("on_checkpoint", result.step, result.path)

    def _tell_callbacks(self, hook: str, *what: Any) -> None:
        """Call this hook of the callbacks, which may take its time: what the rank is at until it says the next."""
        if self.callbacks.have(hook):
            self._say_progress(hook, self.state.step)
        self.callbacks.tell(hook, *what)

    def _say_progress(self, phase: str, step: int, sequences: int = 0) -> None:
        self.rank_progress.write(step, phase, sequences, self._busy, self._seconds)

    def _event(self, text: str | None) -> None:
        self._enter(text or "record")
        if text is not None:
            self._say_progress(text, self.state.step)
        if self.writer is not None:
            self.writer.event(text)

    def _note(self, text: str) -> None:
        if self.writer is not None:
            self.writer.note(text)

    def _warn(self, text: str) -> None:
        """Warn of what concerns this rank alone: at the terminal, or in the rank's log."""
        self._note(text) if self.writer is not None else say(text, file=sys.stderr)
