"""The training loop, the same on every rank.

Each step reads this rank's share of the batch, trains (training_engine.py) and records metrics. The loop saves
checkpoints every checkpoint.every steps, and when a hook requests it. Hooks (live_run.py) do all other work.
"""

import time
from contextlib import closing
from typing import TYPE_CHECKING

from cluster.run_files import step_name
from conf.disk import disk_errors
from conf.errors import EXIT_OK, EXIT_STOPPED, DiskFailed
from conf.micro_batches import share_of
from train.data.prefetch import Prefetch
from train.loop.live_run import LiveRun
from train.loop.stop import StopKind, StopRequest
from train.optim.schedules import Schedules, StepPlan

if TYPE_CHECKING:
    from train.loop.hooks.copies_in_memory import CopiesInMemory

NEXT_PHASE = {"schedule": "reduction", "reduction": "update", "update": "record"}
"""Maps each phase of a step to the next phase."""


class Trainer:
    """Trains one rank until the last step or a request to stop."""

    def __init__(self, run: LiveRun, stop: StopRequest, copies: "CopiesInMemory"):
        """copies: the hook that copies the state to memory."""
        self.run, self.stop, self._copies = run, stop, copies
        self.goes_on = False
        """Whether another attempt resumes at once from copies in memory."""
        self._saved: int | None = None
        """The step of the newest checkpoint for which `on_save` was called."""

    def train(self) -> int:
        """Train to the last step. Returns the exit code. Raises RunDiverged and DiskFailed."""
        run = self.run
        with disk_errors(run.config, kind=DiskFailed), closing(run):
            run.tell("on_start")
            code = self._train()
        run.tell("on_end", code)
        return code

    def _train(self) -> int:
        run, config = self.run, self.run.config
        steps = range(run.state.step + 1, config.steps + 1)
        if not steps:
            run.note(f"all {config.steps} steps of this run are complete; raise steps= to continue the training")
            if not (run.folder / "checkpoints" / step_name(run.state.step)).exists():
                self._save(final=True)  # the state came from another run: this run has no checkpoint
            return EXIT_OK
        schedules = Schedules(config)
        # The data continue at the checkpoint's position, even after a change of batch size.
        shift = run.state.samples - schedules.samples[run.state.step]
        plans = (schedules.plan(step, shift) for step in steps)
        shares = (self._share(schedules.plan(step, shift)) for step in steps)
        with Prefetch(run.data.train.batch, shares) as batches:
            for plan in plans:
                stop = self._step(plan, batches)
                if stop is not StopKind.none:
                    self.goes_on = stop is StopKind.in_memory and self._copies.save_and_wait(run)
                    if not self.goes_on:
                        self._save(final=True)
                    return EXIT_STOPPED
        self._save(final=True)
        return EXIT_OK

    def _share(self, plan: StepPlan) -> tuple[int, int]:
        """Returns first sample and number of samples of this rank's share."""
        first, count = share_of(self.run.config, plan.batch_size, self.run.mesh.dp_rank)
        return plan.first_sample + first, count

    def _step(self, plan: StepPlan, batches: Prefetch) -> StopKind:
        """Run one step. Returns how the run was asked to stop."""
        run, state, waited = self.run, self.run.state, batches.waited
        run.plan, run.step = plan, plan.step
        run.enter("data")
        run.started = time.perf_counter()
        run.batch = next(batches)
        run.enter("schedule")
        run.tell("on_batch", plan.step, run.batch)
        outcome = run.outcome = run.engine.run(
            plan,
            run.batch,
            stopping=self.stop.pending,
            on_phase=lambda ended: run.enter(NEXT_PHASE[ended]),
        )
        if not self.stop.has_stepped:
            run.mesh.wait_at_most(run.config.cluster.timeout)
        self.stop.has_stepped = True
        run.tell("on_update" if outcome.update.applied else "on_skip", plan.step)
        state.step, state.samples = plan.step, plan.first_sample + plan.batch_size
        for source in run.data.train.read_once(plan.first_sample, state.samples):
            run.note(
                f"step {plan.step}: all training text of {source} has been read once; from this step on it is repeated"
            )
        record = {"step": plan.step, "data_wait_seconds": batches.waited - waited}
        run.tell("on_step", plan.step, record)
        # Save only after the record is written: a resumed run would never write it.
        every = run.config.checkpoint.every
        if plan.step < run.config.steps and (run.wants_save or (every and plan.step % every == 0)):
            self._save()
        run.wants_save = False
        return outcome.measured.stop

    def _save(self, final: bool = False) -> None:
        """Save the state. final: also wait until it is saved."""
        self.run.saver.save(self.run, final)
        if self._saved != self.run.state.step:
            self._saved = self.run.state.step
            self.run.tell("on_save", self._saved)
