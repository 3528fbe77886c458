"""The view that the loop and its hooks have of a run, and the interface of a hook.

A hook is an object with any of these methods. Every rank has its own hooks and calls them in the order of one list
(train/loop/hooks/hook_list.py), which includes the `callbacks` of a recipe:

    on_start(run)                    the state is restored; this attempt has done no step
    on_phase(run, step, phase)       a phase begins. In a step: data, schedule (forward and backward), reduction, update,
                                     record. Outside of steps: validation, checkpoint, then record again at their end
    on_batch(run, step, batch)       this rank's share of the step's batch is loaded, and the passes begin
    on_update(run, step)             the optimizer has updated the weights
    on_skip(run, step)               the step makes no update, because its loss or gradient is not finite
    on_step(run, step, record)       the step is done; record: metric name -> value (train/metrics/names.py) over all ranks
    on_save(run, step)               the state is copied for a checkpoint, whose files are written during training
    on_checkpoint(run, step, path)   a checkpoint is complete; on ranks other than 0: this rank has written its part. Called
                                     when the next checkpoint is due, or at the end
    on_end(run, code)                the last checkpoint is written; code: of conf/errors.py
    close(run)                       the run has ended, perhaps by an error: release resources that would outlive it

A hook may communicate if all ranks of a group make the same calls in the same order. It may not communicate in
`on_checkpoint`, which ranks call at different times, nor in `on_phase` of validation and checkpoint, which rank 0 may
enter alone.

A hook may keep state, which checkpoints then include:

    shards()         its tensors by name, as in parallel/shard.py: on each rank the intervals that this rank writes
    wanted()         the shards that this rank reads; without this method, the shards of `shards`
    meta()           other state, for JSON. A checkpoint has the hook's shards if it has all of these keys, none of them false
    restore(meta)    the run resumes from a checkpoint with this meta, after its tensors are read; None: no such checkpoint
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
"""Methods of a hook and their arguments."""


@dataclass
class LiveRun:
    """One rank of a run: its parts, its position, and its messages to the user. User code gets `rank`, `folder` and
    `chunks`."""

    config: Config
    setup: RankSetup
    parts: ParallelModel
    state: "RunState"
    data: "PreparedData"
    engine: "Engine"
    saver: "Saver"
    writer: "MetricsWriter | None"
    """The writer of metrics on rank 0; None on the others."""
    hooks: Sequence[Any]
    plan: "StepPlan" = field(init=False)
    """Settings of the current step."""
    batch: "Batch" = field(init=False)
    outcome: "StepOutcome" = field(init=False)
    """Results of the step's passes and update."""
    started: float = 0.0
    """Start of the step, by time.perf_counter."""
    seconds: float | None = None
    """Seconds of the previous step, without validation and saving; None before the first step of an attempt."""
    wants_save: bool = False
    """Set by a hook that requests a checkpoint of this step."""

    def __post_init__(self) -> None:
        self.device, self.mesh = self.setup.device, self.setup.mesh
        self.rank, self.folder, self.chunks = self.mesh.rank, RunPaths(self.config).path, self.parts.chunks
        """Rank number, run folder, and this rank's part of the model."""
        self.step = self.state.step
        """The current step, or the last one."""

    def tell(self, method: str, *what: Any) -> None:
        """Call this method of all hooks that have it. An exception from a hook ends the run."""
        for hook in self.hooks:
            if call := getattr(hook, method, None):
                call(self, *what)

    def close(self) -> None:
        """Let all hooks release their resources."""
        self.tell("close")

    def enter(self, phase: str) -> None:
        """Report the begin of a phase, see the top of the file."""
        self.tell("on_phase", self.step, phase)

    @contextmanager
    def beside(self, phase: str) -> Iterator[None]:
        """A context for work outside of steps: validation or checkpoint."""
        self.enter(phase)
        yield
        self.enter("record")

    def note(self, text: str) -> None:
        """Show a sentence to the user at the terminal, from rank 0."""
        if self.writer is not None:
            self.writer.note(text)

    def warn(self, text: str) -> None:
        """Warn about this rank only: at the terminal on rank 0, else in the rank's log."""
        self.note(text) if self.writer is not None else say(text, file=sys.stderr)

    def got_on(self) -> None:
        """Called by a hook to report progress, so that the rank does not count as hung."""
        got_on()
