"""Steps whose loss or gradient is not finite: they change nothing except the position in the data."""

from collections.abc import Callable
from dataclasses import replace

import torch

from parallel.zero.engine import Zero
from parallel.zero.whole_weights import WholeWeights
from tests.prove.mutations.registry import OURS, UPDATE, mutation
from tests.prove.mutations.seams import Seams
from train.loop.hooks.skipped_steps import SkippedSteps
from train.loop.trainer import Trainer
from train.loop.training_engine import Engine

SKIP = (UPDATE, "skip")


def where_skipped(bug: Seams, change: Callable[[Zero], None]) -> None:
    """Change the state after a step of ZeRO that made no update."""

    def step(original, self, valid=True):
        update = original(self, valid)
        if not update.applied:
            change(self)
        return update

    bug.around(Zero, "step", step)


@mutation(OURS + ": a skipped step moves the biases", "skips", SKIP, "bias")
def skipped_step_moves_the_biases(bug: Seams) -> None:
    def run(original, self, plan, batch, **keywords):
        outcome = original(self, plan, batch, **keywords)
        if not outcome.update.applied:
            self._update_biases(outcome.measured.loads_LE, plan)
        return outcome

    bug.around(Engine, "run", run)


@mutation("huggingface/accelerate#4242: a skipped step is counted", "skips", SKIP, "update|count|step")
def skipped_step_counts(bug: Seams) -> None:
    def change(zero: Zero) -> None:
        zero.client.updates += 1

    where_skipped(bug, change)


@mutation(
    "mindspore-lab/mindcv#703: a skipped step moves the average of the weights", "skips averaged", SKIP, "average|ema"
)
def skipped_step_moves_the_average(bug: Seams) -> None:
    def on_skip(original, self, run, step):
        for hook in run.state.keepers:
            hook.on_update(run, step)
        original(self, run, step)

    bug.around(SkippedSteps, "on_skip", on_skip)


@mutation(OURS + ": weights decay in a skipped step", "skips", SKIP, "master|weight")
def skipped_step_decays(bug: Seams) -> None:
    def change(zero: Zero) -> None:
        for name, shard in zero.shards().items():
            if name.startswith("master."):
                shard.local.mul_(1 - 1e-4)
        zero._weights.refresh()

    where_skipped(bug, change)


@mutation(OURS + ": moments fade in a skipped step", "skips", SKIP, "moments|exp_avg")
def skipped_step_fades_moments(bug: Seams) -> None:
    def change(zero: Zero) -> None:
        for name, shard in zero.shards().items():
            if name.startswith("exp_avg."):
                shard.local.mul_(0.9)

    where_skipped(bug, change)


@mutation(
    "NVIDIA-NeMo/Speech#3293 has the reverse: data that were skipped come again",
    "skips",
    (*SKIP, "settings", "resume"),
    "sample|data",
)
def skipped_step_keeps_its_data(bug: Seams) -> None:
    def step(original, self, plan, batches):
        skipped = self.run.state.skipped
        stop = original(self, plan, batches)
        if self.run.state.skipped > skipped:
            self.run.state.samples -= plan.batch_size
        return stop

    bug.around(Trainer, "_step", step)


@mutation(
    OURS + ": gradients that are no numbers count as zeros, and the step is made", "skips", SKIP, "update|norm|master"
)
def numbers_that_are_none_count_as_zeros(bug: Seams) -> None:
    def global_norm(original, self):
        for _, gradient, _ in self._weights.gradients():
            gradient.nan_to_num_(0.0, 0.0, 0.0)
        return original(self)

    def step(original, self, valid=True):
        return original(self, True)

    bug.around(Zero, "_global_norm", global_norm)
    bug.around(Zero, "step", step)


@mutation(
    "espnet/espnet#3283: gradients of a skipped step stay for the next",
    "skips",
    (*SKIP, "reduction"),
    "gradients|norm|update",
)
def gradients_of_a_skipped_step_stay(bug: Seams) -> None:
    kept: dict[torch.nn.Parameter, torch.Tensor] = {}

    def keep_unshared(original, self):
        for param in self._groups[0]:
            own = param.grad.clone()
            if param in kept:
                param.grad.add_(kept.pop(param))
            kept[param] = own.nan_to_num(0.0, 0.0, 0.0)
        original(self)

    def step(original, self, valid=True):
        update = original(self, valid)
        if update.applied:
            kept.clear()
        return update

    bug.around(WholeWeights, "_keep_unshared", keep_unshared)
    bug.around(Zero, "step", step)


@mutation(OURS + ": an update of what is not finite", "skips", SKIP, "update|norm|master|moments")
def made_whatever_the_gradient(bug: Seams) -> None:
    def global_norm(original, self):
        original(self)
        self._norm = self._norm.nan_to_num(1.0)
        return self._norm

    bug.around(Zero, "_global_norm", global_norm)


@mutation(OURS + ": a step is skipped that need not be", "skips", (UPDATE,), "update|norm")
def large_gradients_are_skipped(bug: Seams) -> None:
    def step(original, self, valid=True):
        self.calls = getattr(self, "calls", 0) + 1
        return original(self, valid if self.calls != 2 else False)

    bug.around(Zero, "step", step)


@mutation(OURS + ": a skipped step is told as one that was made", "skips", SKIP, "update|norm")
def skipped_step_told_as_made(bug: Seams) -> None:
    def step(original, self, valid=True):
        update = original(self, valid)
        return update if update.applied else replace(update, applied=True)

    bug.around(Zero, "step", step)


@mutation(
    "espnet/espnet#3283 in the host's memory: DeepSpeed adds the next gradients to those of a skipped step",
    "skips offloaded",
    (*SKIP, "reduction"),
    "gradients|norm|update",
    "recipe",
)
def gradients_stay_on_the_host(bug: Seams) -> None:
    def forget(original, self):
        self._handover.unreduced.clear()

    bug.around(WholeWeights, "forget_gradients", forget)
