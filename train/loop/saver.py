"""Saves a run's checkpoints, and reports them to hooks and user."""

from collections.abc import Sequence
from typing import Any

from conf.changed_settings import settings_of
from conf.errors import RunEnded
from conf.schema import Config
from train.checkpoint.checkpointer import Checkpointer, SaveResult
from train.data.streamed import StreamedData
from train.loop.live_run import LiveRun


class RunOvertaken(RunEnded):
    """A newer attempt of this run has started: this attempt must stop."""


class Saver:
    """Saves the state of one rank."""

    def __init__(self, config: Config, checkpointer: Checkpointer):
        self.checkpointer, self._settings = checkpointer, settings_of(config)
        self.stall = 0.0
        """Seconds that training has waited for checkpoints since the last record."""

    def save(self, run: LiveRun, final: bool = False) -> None:
        """Begin a checkpoint. final: wait for it, and raise its errors."""
        with run.beside("checkpoint"):
            self.stall += self.checkpointer.save(run.state.step, run.state.shards(), self.meta(run))
            self._tell(run, self.checkpointer.finish(required=True) if final else self.checkpointer.poll())

    def finish(self, run: LiveRun) -> None:
        """Wait until the checkpoint that is being written is complete."""
        with run.beside("checkpoint"):
            self._tell(run, self.checkpointer.finish())

    def meta(self, run: LiveRun) -> dict[str, Any]:
        """Returns everything that a checkpoint stores besides tensors."""
        config, data = run.config, run.data.train
        stream = {"stream": data.mark(run.state.samples)} if isinstance(data, StreamedData) else {}
        return (run.state.meta() | stream) | {
            "name": config.name,
            "tokenizer": run.data.tokenizer.fingerprint,
            "data": run.data.fingerprint,
            "held_out": run.data.held_out,
            "seed": config.seed,
            "seq_len": config.seq_len,
            "config": self._settings,
        }

    def _tell(self, run: LiveRun, results: Sequence[SaveResult]) -> None:
        for result in results:
            if result.fenced:
                raise RunOvertaken(result.warning or "a newer attempt of this run has started")
            if result.warning:
                run.warn(result.warning)
            if result.path is not None:
                run.tell("on_checkpoint", result.step, result.path)
            elif run.writer is not None:
                run.writer.alert("a checkpoint is not written", result.warning or "")
