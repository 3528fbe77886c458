"""Defines `LiveRun`, which the loop and its hooks use to access a run, and the interface of a hook.

A hook is an object with any of these methods. Every rank calls its hooks in the order of train/loop/hooks/hook_list.py:

    on_start(run)                    the state is restored, and this attempt has done no step yet
    on_phase(run, step, phase)       a phase begins. In a step: data, schedule (forward and backward), reduction,
                                     update, record. Outside of steps: validation or checkpoint; at their end, record
    on_batch(run, step, batch)       this rank's share of the step's batch is loaded
    on_update(run, step)             the optimizer has updated the weights
    on_skip(run, step)               the step skips its update, because its loss or gradient is not finite
    on_step(run, step, record)       the step is done; record: metrics by name (train/metrics/names.py), over all ranks
    on_save(run, step)               the state is copied for a checkpoint, whose files are written during training
    on_checkpoint(run, step, path)   a checkpoint is complete; on ranks other than 0: this rank's files are written.
                                     Called at the next save, or at the end
    on_end(run, code)                the last checkpoint is written; code: an exit code of conf/errors.py
    close(run)                       the run has ended, perhaps with an error: release the hook's resources

A hook may communicate if all ranks of a group make the same calls in the same order. It may not communicate
- in `on_checkpoint`, because ranks call this method at different times
- in `on_phase` of validation and checkpoint, because rank 0 may enter these phases alone

A hook may keep state, which checkpoints then include:

    shards()         returns the hook's tensors by name (parallel/shard.py): the intervals that this rank writes
    wanted()         returns the shards that this rank reads; by default those of `shards`
    meta()           returns other state as JSON values. A checkpoint contains the hook's shards if its meta has all of
                     these keys and none of the values is false
    restore(meta)    is called after the tensors are read. meta: the checkpoint's meta; None if it lacks the state
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.comm_ring import got_on
from conf.run_paths import RunPaths
from conf.schema import Config
from conf.words import say
from train.rank_parts import ParallelModel, RankSetup

if TYPE_CHECKING:
    from train.data.batch import Batch
    from train.data.prepare import PreparedData
    from train.loop.saver import Saver
    from train.loop.state import RunState
    from train.loop.training_engine import Engine, StepOutcome
    from train.optim.schedules import StepPlan
    from train.show.writer import MetricsWriter

HOOK_METHODS = {
    "on_start": "run",
    "on_batch": "run, step, batch",
    "on_phase": "run, step, phase",
    "on_update": "run, step",
    "on_skip": "run, step",
    "on_step": "run, step, record",
    "on_save": "run, step",
    "on_checkpoint": "run, step, path",
    "on_end": "run, code",
}
"""Maps each method of a hook to its argument names."""


@dataclass
class LiveRun:
    """Gives access to one rank of a run. User code may use `rank`, `folder` and `chunks`."""

    config: Config
    setup: RankSetup
    parts: ParallelModel
    state: "RunState"
    data: "PreparedData"
    engine: "Engine"
    saver: "Saver"
    writer: "MetricsWriter | None"
    """Writer of metrics on rank 0; None on other ranks."""
    hooks: Sequence[Any]
    plan: "StepPlan" = field(init=False)
    """Settings of the current step."""
    batch: "Batch" = field(init=False)
    outcome: "StepOutcome" = field(init=False)
    """Results of the current step's passes and update."""
    started: float = 0.0
    """Start time of the current step, from time.perf_counter."""
    seconds: float | None = None
    """Seconds of the previous step, without validation and saving; None in an attempt's first step."""
    wants_save: bool = False
    """Whether a hook has requested a checkpoint of this step."""

    def __post_init__(self) -> None:
        self.device, self.mesh = self.setup.device, self.setup.mesh
        self.rank, self.folder, self.chunks = self.mesh.rank, RunPaths(self.config).path, self.parts.chunks
        """This rank's index, run folder, and chunks."""
        self.step = self.state.step
        """Index of the current or last completed step."""

    def tell(self, method: str, *what: Any) -> None:
        """Call the method with the name `method` of every hook that has such a method. An exception ends the run."""
        for hook in self.hooks:
            if call := getattr(hook, method, None):
                call(self, *what)

    def close(self) -> None:
        """Let all hooks release their resources."""
        self.tell("close")

    def enter(self, phase: str) -> None:
        """Report the beginning of a phase (see the module docstring)."""
        self.tell("on_phase", self.step, phase)

    @contextmanager
    def beside(self, phase: str) -> Iterator[None]:
        """Returns a context manager for work outside of steps."""
        self.enter(phase)
        yield
        self.enter("record")

    def note(self, text: str) -> None:
        """Show a text at the user's terminal, from rank 0."""
        if self.writer is not None:
            self.writer.note(text)

    def warn(self, text: str) -> None:
        """Show a warning about this rank, at the terminal or in the log."""
        self.note(text) if self.writer is not None else say(text, file=sys.stderr)

    def got_on(self) -> None:
        """Report progress in a long hook. Otherwise the rank counts as hung."""
        got_on()
