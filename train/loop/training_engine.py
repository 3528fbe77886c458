"""One training step of a rank: the same for a run, for a dry run and for whoever times one.

weights     what losses and routers count in this step
passes      forward and backward of all micro-batches
measures    losses, loads and times, summed over all ranks
update      gradients reduced, clipped and applied, unless loss or gradient is not finite
balance     the biases of the routers move by the loads of this step (paper 2.1.2)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema import Config
from parallel.mesh import Mesh
from parallel.update_result import Update
from train.data.batch import Batch
from train.loop.measure import Measure, MeasuredStep, to_device
from train.loop.stop import StopKind
from train.model.deepseek import DeepSeekV3
from train.model.router import update_bias
from train.optim.qk_clip import QKClip
from train.optim.schedules import StepPlan
from train.rank_parts import ParallelModel, RankSetup


def set_weights(chunks: Sequence[DeepSeekV3], plan: StepPlan, balance_weight: float) -> None:
    """What routers and the MTP modules count in this step, and which it is. balance_weight: alpha / micro-batches."""
    for chunk in chunks:
        chunk.mtp_weight, chunk.step = plan.mtp_weight, plan.step
        for router in chunk.routers().values():
            router.balance_weight = balance_weight


@dataclass(frozen=True)
class StepOutcome:
    """What a step came to. Without an applied update the weights and biases are those before it."""

    measured: MeasuredStep
    update: Update
    scores_LH: Tensor
    """Largest attention score of every head of this rank's layers, as `QKClip.largest` gives them; none where nobody asks for them."""


class Engine:
    """Makes the steps of one rank; every rank makes the same ones."""

    def __init__(self, config: Config, parts: ParallelModel, rank: RankSetup):
        self._config, self._parts, self._device, self._layout = config, parts, rank.device, rank.mesh.layout
        self._sequences = config.micro_batch_size * rank.mesh.layout.dp
        """Sequences of one micro-batch of every data-parallel rank."""
        self._mean_micro_batches = 0.0
        """Mean micro-batches of a data-parallel rank in this step: what losses are divided by, so that all tokens of
        the batch weigh the same where shares differ (parallel.uneven)."""
        self.clip = self._watch_scores(config.optim.qk_clip, parts, rank.mesh)
        self.measure = Measure(config.model, parts, rank, self.clip)

    def run(
        self,
        plan: StepPlan,
        batch: Batch,
        *,
        stopping: StopKind = StopKind.none,
        on_phase: Callable[[str], None] = lambda _: None,
    ) -> StepOutcome:
        """batch: this rank's share. stopping: how this rank was asked to stop, which all ranks then know. on_phase: called at the
        ends of `schedule` (forward and backward), `reduction` and `update`."""
        zero = self._parts.zero
        zero.set_lr(plan.lr)
        self._set_weights(plan, batch)
        with zero.accumulate():
            self.run_passes(batch)
            self._parts.precision.end_passes()
            on_phase("schedule")
            collected = self.measure.collect(stopping)
            if self.clip is not None:
                zero.scale_rows(self.clip.factors(collected.scores_LH))
        on_phase("reduction")
        update = zero.step(collected.finite)
        measured = collected.read()  # the update has waited for the norm of the gradients
        on_phase("update")
        if update.applied:
            self._update_biases(collected.loads_LE, plan)
        return StepOutcome(measured, update, collected.scores_LH)

    def _watch_scores(self, limit: float | None, parts: ParallelModel, mesh: Mesh) -> QKClip | None:
        if limit is None:
            return None

        def most(scores: Tensor) -> None:
            if mesh.layout.stage_ranks > 1:
                dist.all_reduce(scores, dist.ReduceOp.MAX, group=mesh.stage_group)

        return QKClip(parts.chunks, self._config.model, limit, most)

    def run_passes(self, batch: Batch) -> None:
        """Forward and backward of all micro-batches."""
        tokens_BS, micro_batches = to_device(batch.tokens_BS, self._device), self._micro_batches(batch)
        self._parts.pipeline.step(
            tokens_BS,
            batch.documents_BS,
            supervised_BS=batch.supervised_BS,
            micro_batches=micro_batches,
            mean=self._mean_micro_batches,
        )
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # what the passes took is part of what all ranks are told

    def _micro_batches(self, batch: Batch) -> int:
        return len(batch.tokens_BS) // self._config.micro_batch_size

    def _set_weights(self, plan: StepPlan, batch: Batch) -> None:
        self._mean_micro_batches = plan.batch_size / self._sequences
        self.measure.clear(self._micro_batches(batch) / self._mean_micro_batches)
        self._parts.precision.start_step(plan.step, self._config.holds_weights)
        targets, sequences = self._totals(batch, plan)
        balance_weight = self._config.optim.balance_loss * self._sequences / sequences
        set_weights(self._parts.chunks, plan, balance_weight)
        for chunk in self._parts.chunks:
            chunk.loss_divisor = None
            if targets is not None:
                chunk.loss_divisor = targets / (self._layout.stage_ranks * self._mean_micro_batches)

    def _totals(self, batch: Batch, plan: StepPlan) -> tuple[int | None, int]:
        """Supervised tokens, and sequences or samples, of the whole step: each weighs the same, on whichever rank and in whichever
        micro-batch it is. None where all tokens are learnt, and all ranks have as many.
        """
        if batch.supervised_BS is None:
            return None, plan.batch_size
        totals = torch.tensor([batch.targets, batch.sequences], dtype=torch.int64, device=self._device)
        if self._layout.world > 1:
            dist.all_reduce(totals)
        alike = self._layout.pp * self._layout.cp  # ranks that have the same share
        targets, sequences = totals.tolist()
        return targets // alike, sequences // alike

    def _update_biases(self, loads_LE: Tensor, plan: StepPlan) -> None:
        for name, router in self.measure.routers.items():
            update_bias(router.bias_E, loads_LE[self.measure.layers.index(name)], plan.bias_speed)
