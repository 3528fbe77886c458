"""A run as its loop and its hooks see it, and what a hook is.

A hook is an object with any of these methods. Every rank has hooks of its own and calls them in the order of one list
(train/loop/hooks/hook_list.py), which the `callbacks` of a recipe are part of:

    on_start(run)                    the state is restored, and no step of this attempt is done
    on_phase(run, step, phase)       a phase begins. In a step: data, schedule (forward and backward), reduction, update, record.
                                     Beside steps: validation, checkpoint, and record again when they are over
    on_batch(run, step, batch)       this rank's share of the step's batch is there, and the passes begin
    on_update(run, step)             the optimizer has made its update
    on_skip(run, step)               the step makes no update, as its loss or gradient is not finite
    on_step(run, step, record)       the step is done; record: metric name -> value (train/metrics/names.py), of all ranks together
    on_save(run, step)               the state is copied for a checkpoint, whose files are written beside the training
    on_checkpoint(run, step, path)   a checkpoint is whole; on other ranks than 0: this rank has done its part of it. Told when
                                     the next one is due, or at the end
    on_end(run, code)                the last checkpoint is written; code: of conf/errors.py
    close(run)                       the run has ended, perhaps by an error: give back what would outlive it

A hook may communicate, in the same calls and the same order on all ranks of a group. It may not in `on_checkpoint`, which ranks
call when they learn of it, nor in `on_phase` of validation and checkpoint, which rank 0 may enter alone.

A hook may keep state, which checkpoints then hold:

    shards()         its tensors by name, as of parallel/shard.py: on each rank the intervals that this rank writes
    wanted()         those that this rank reads; without this method those of `shards`
    meta()           what is kept beside, for JSON. A checkpoint with all of these keys, none of them false, has the shards
    restore(meta)    the run goes on: from a checkpoint with this meta, whose tensors are read; None: from one without
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
"""What a hook may be told of, and with what."""


@dataclass
class LiveRun:
    """One rank of a run: its parts, where it is, and its ways to speak. Code of the user's sees `rank`, `folder` and `chunks`."""

    config: Config
    setup: RankSetup
    parts: ParallelModel
    state: "RunState"
    data: "PreparedData"
    engine: "Engine"
    saver: "Saver"
    writer: "MetricsWriter | None"
    """The writer of metrics, on rank 0; None on the others."""
    hooks: Sequence[Any]
    plan: "StepPlan" = field(init=False)
    """Settings of the step at hand."""
    batch: "Batch" = field(init=False)
    outcome: "StepOutcome" = field(init=False)
    """What the passes and the update of the step came to."""
    started: float = 0.0
    """When the step began, of time.perf_counter."""
    seconds: float | None = None
    """Seconds of the step before, without validation and saving; None before the first of an attempt."""
    wants_save: bool = False
    """A hook asks for a checkpoint of this step."""

    def __post_init__(self) -> None:
        self.device, self.mesh = self.setup.device, self.setup.mesh
        self.rank, self.folder, self.chunks = self.mesh.rank, RunPaths(self.config).path, self.parts.chunks
        """Number of the rank, folder of the run, and this rank's part of the model."""
        self.step = self.state.step
        """The step at hand, or the last one."""

    def tell(self, method: str, *what: Any) -> None:
        """Call this method of all hooks that have it. What one raises ends the run."""
        for hook in self.hooks:
            if call := getattr(hook, method, None):
                call(self, *what)

    def close(self) -> None:
        """Let all hooks give back what they hold."""
        self.tell("close")

    def enter(self, phase: str) -> None:
        """A phase begins, see the top of the file."""
        self.tell("on_phase", self.step, phase)

    @contextmanager
    def beside(self, phase: str) -> Iterator[None]:
        """Work beside steps: validation or checkpoint."""
        self.enter(phase)
        yield
        self.enter("record")

    def note(self, text: str) -> None:
        """A sentence for the person at the terminal, from rank 0."""
        if self.writer is not None:
            self.writer.note(text)

    def warn(self, text: str) -> None:
        """Warn of what concerns this rank alone: at the terminal, or in the rank's log."""
        self.note(text) if self.writer is not None else say(text, file=sys.stderr)

    def got_on(self) -> None:
        """A hook has done a piece of its work, and does not hang."""
        got_on()
