"""log.validate_every: measures the loss on held-out sequences. checkpoint.keep_best: saves the state with the lowest
loss."""

import math

from train.checkpoint.run_folder import write_best
from train.loop.live_run import LiveRun
from train.loop.validation import held_out_loss
from train.metrics.names import Record


class Validation:
    """Measures the held-out loss every log.validate_every steps, and in the last step."""

    def on_step(self, run: LiveRun, step: int, record: Record) -> None:
        every = run.config.log.validate_every
        if step == run.config.steps or (every and step % every == 0):
            with run.beside("validation"):
                size = run.config.micro_batch_size
                found = held_out_loss(run.parts.pipeline, run.data.validation, run.mesh, size, run.device)
            record |= {"validation_loss": found.loss, "validation_bits_per_byte": found.bits_per_byte}


class BestKept:
    """Requests a checkpoint when the held-out loss is the lowest so far. Records the step in the run's state."""

    def on_start(self, run: LiveRun) -> None:
        if run.state.best is not None:
            run.saver.checkpointer.keep_best(run.state.best[0])

    def on_step(self, run: LiveRun, step: int, record: Record) -> None:
        loss, best = record.get("validation_loss"), run.state.best
        if not run.config.checkpoint.keep_best or loss is None or not math.isfinite(loss):
            return
        if best is None or loss < best[1]:
            run.state.best = step, loss
            run.saver.checkpointer.keep_best(step)
            if run.writer is not None:
                write_best(run.folder, step, loss)
            run.wants_save = True
