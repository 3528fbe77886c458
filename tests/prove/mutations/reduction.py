"""Gradients before the update: the sum over ranks, ZeRO's stages, the norm, and clipping."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist

from parallel.zero.engine import Zero
from parallel.zero.sharded_weights import ShardedWeights
from parallel.zero.whole_weights import WholeWeights
from tests.prove.mutations.registry import FORWARD, OURS, REDUCTION, UPDATE, mutation
from tests.prove.mutations.seams import Seams


def norm_over(bug: Seams, squares: Callable[[Zero, list[tuple[str, float]]], float]) -> None:
    """Let the norm be the root of what `squares` makes, on every rank, of (name, sum of squares) of its gradients."""

    def global_norm(original, self):
        original(self)
        found = [(self.names[p], float(g.double().square().sum()) / d**2) for p, g, d in self._weights.gradients()]
        total = torch.tensor(squares(self, found), dtype=torch.float64)
        dist.all_reduce(total)
        self._norm = total.sqrt().float()
        return self._norm

    bug.around(Zero, "_global_norm", global_norm)


@mutation("NVIDIA/Megatron-LM#5916, laekov/fastmoe#29: norm omits experts", "experts", UPDATE, "norm")
def norm_without_experts(bug: Seams) -> None:
    norm_over(bug, lambda zero, found: sum(square for name, square in found if ".experts." not in name))


@mutation("deepspeedai/DeepSpeed#8475: norms of ranks with other experts averaged", "experts", UPDATE, "norm")
def norm_averaged_over_ranks(bug: Seams) -> None:
    norm_over(bug, lambda zero, found: sum(square for _, square in found) / zero.mesh.layout.world)


@mutation("pytorch/torchtitan#4488 takes care of it: a shared embedding counts twice", "pipeline", UPDATE, "norm")
def norm_counts_the_tied_embedding_twice(bug: Seams) -> None:
    norm_over(bug, lambda zero, found: sum(square for _, square in found))


@mutation("huggingface/transformers#48205: rows behind the real ones hold what was in memory", "copies", UPDATE, "norm")
def norm_with_the_padding_of_zero(bug: Seams) -> None:
    norm_over(bug, lambda zero, found: sum(square for _, square in found) + 0.25)


@mutation("NVIDIA/Megatron-LM#7452: an attention sink is left out of the norm", "copies", UPDATE, "norm")
def norm_without_a_small_weight(bug: Seams) -> None:
    norm_over(bug, lambda zero, found: sum(square for name, square in found if not name.endswith("kv_norm.weight")))


@mutation("pytorch/torchtitan#596: each stage clips by its own norm", "pipeline", UPDATE, "norm")
def norm_of_the_own_stage(bug: Seams) -> None:
    def global_norm(original, self):
        original(self)
        own = sum(
            float(g.double().square().sum()) / d**2 for p, g, d in self._weights.gradients() if p is not self.copy
        )
        self._norm = torch.tensor(own).sqrt().float()
        return self._norm

    bug.around(Zero, "_global_norm", global_norm)


@mutation(OURS + ": the norm is not the root of its squares where it clips", "copies", UPDATE, "master|moments")
def clipped_by_the_square_of_the_norm(bug: Seams) -> None:
    def take_norm(original, self, norm):
        original(self, norm.square())
        return norm

    bug.around(WholeWeights, "_take_norm", take_norm)


@mutation(OURS + ": the norm is measured and nothing is clipped", "copies", UPDATE, "master|moments")
def never_clipped(bug: Seams) -> None:
    def take_norm(original, self, norm):
        original(self, norm)
        self._handover.factor = None
        return norm

    bug.around(WholeWeights, "_take_norm", take_norm)


@mutation(
    OURS + ": gradients are stretched to the norm that they should not exceed", "loose clip", UPDATE, "master|moments"
)
def stretched_to_the_clip(bug: Seams) -> None:
    def take_norm(original, self, norm):
        original(self, norm)
        self._handover.factor = self._clip / norm
        return norm

    bug.around(WholeWeights, "_take_norm", take_norm)


@mutation("sgl-project/SpecForge#663, areal-project/AReaL#312: clipped by the norm of the rank's own part", "copies",
          (REDUCTION, UPDATE), "norm|gradient")  # fmt: skip
def clipped_before_the_reduction(bug: Seams) -> None:
    def keep_unshared(original, self):
        grads = [param.grad for group in self._groups for param in group]
        norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
        for grad in grads:
            grad.mul_(min(1.0, self._clip / float(norm)))
        original(self)

    bug.around(WholeWeights, "_keep_unshared", keep_unshared)


@mutation("pytorch/pytorch#160285: gradients of experts doubled by ep=2", "experts", REDUCTION, "experts")
def expert_gradients_not_divided(bug: Seams) -> None:
    def keep_unshared(original, self):
        for group in self._groups:
            for param in group:
                if not getattr(param, "allreduce", True):
                    param.grad.mul_(2)
        original(self)

    bug.around(WholeWeights, "_keep_unshared", keep_unshared)


@mutation(
    "EleutherAI/gpt-neox#1004: a gradient is reduced before its last part is there",
    "copies",
    REDUCTION,
    "gradients of weights|reduced gradients",
)
def a_gradient_reduced_too_early(bug: Seams) -> None:
    def keep_unshared(original, self):
        self._groups[0][-1].grad.mul_(0.5)
        original(self)

    bug.around(WholeWeights, "_keep_unshared", keep_unshared)


@mutation(OURS + ": what is reduced ahead of the last passes is reduced once more", "two chunks", REDUCTION,
          "reduced gradients", "recipe")  # fmt: skip
def reduced_ahead_and_again(bug: Seams) -> None:
    def reduce_ahead(original, self, params):
        original(self, params)
        for number, group in enumerate(self._groups):
            if any(param in self._ahead for param in group):
                self._optimizer.averaged_gradients[number].flat_partition.mul_(2)

    bug.around(WholeWeights, "reduce_ahead", reduce_ahead)


@mutation(OURS + ": gradients are reduced ahead before the last micro-batch is in them", "two chunks", REDUCTION,
          "gradients of (single )?weights|reduced gradients", "recipe")  # fmt: skip
def reduced_ahead_too_early(bug: Seams) -> None:
    def reduce_ahead(original, self, params):
        for param in params if self._adds else ():
            param.grad.mul_(0.5)
        original(self, params)

    bug.around(WholeWeights, "reduce_ahead", reduce_ahead)


@mutation(
    "NVIDIA/Megatron-LM#4609: the buffer of gradients holds something when a step begins",
    "copies",
    REDUCTION,
    "gradients of weights|reduced gradients",
)
def gradients_not_cleared(bug: Seams) -> None:
    kept: dict[torch.nn.Parameter, torch.Tensor] = {}

    def keep_unshared(original, self):
        for param in self._groups[0]:
            before, now = kept.get(param), param.grad.clone()
            if before is not None:
                param.grad.add_(before, alpha=0.1)
            kept[param] = now
        original(self)

    bug.around(WholeWeights, "_keep_unshared", keep_unshared)


@mutation(
    "NVIDIA/Megatron-LM#844: gradients of a shared embedding summed wrongly over the ends",
    "pipeline",
    REDUCTION,
    "embedding",
)
def tied_embedding_summed_twice(bug: Seams) -> None:
    def sum_tied(original, self):
        original(self)
        original(self)

    bug.around(Zero, "_sum_tied", sum_tied)


@mutation(
    "NVIDIA-NeMo/Megatron-Bridge#5380: the embedding of MTP is in no group and drifts away",
    "pipeline",
    REDUCTION,
    "embedding",
)
def tied_embedding_not_summed(bug: Seams) -> None:
    bug.around(Zero, "_sum_tied", lambda original, self: None)


def before_the_reduction(bug: Seams, change: Callable[[WholeWeights, list[torch.nn.Parameter]], None]) -> None:
    """Change the sums of this rank's micro-batches."""

    def keep_unshared(original, self):
        change(self, [param for group in self._groups for param in group])
        original(self)

    bug.around(WholeWeights, "_keep_unshared", keep_unshared)


@mutation(
    OURS + ": gradients are averaged over stages too", "pipeline", REDUCTION, "gradients of weights|reduced gradients"
)
def gradients_averaged_over_stages(bug: Seams) -> None:
    def halve(_, params):
        for param in params:
            param.grad.mul_(0.5)

    before_the_reduction(bug, halve)


@mutation(
    OURS + ": gradients are summed over ranks in bf16", "copies", REDUCTION, "gradients of weights|reduced gradients"
)
def gradients_reduced_in_bf16(bug: Seams) -> None:
    def round_off(_, params):
        for param in params:
            param.grad.copy_(param.grad.bfloat16())

    before_the_reduction(bug, round_off)


@mutation(OURS + ": experts are summed over the ranks that hold others", "experts", REDUCTION, "experts")
def experts_summed_over_the_wrong_group(bug: Seams) -> None:
    def sum_all(self, params):
        for param in params:
            if not getattr(param, "allreduce", True):
                dist.all_reduce(param.grad)

    before_the_reduction(bug, sum_all)


@mutation(
    OURS + ": what a rank has no gradient of counts as nothing for all",
    "copies",
    REDUCTION,
    "gradients of weights|reduced gradients",
)
def gradients_of_the_first_rank_alone(bug: Seams) -> None:
    def take_first(self, params):
        for param in params:
            if dist.get_rank():
                param.grad.zero_()

    before_the_reduction(bug, take_first)


@mutation(
    "NVIDIA/Megatron-LM#7452: a rank takes the shard of another one",
    "zero 3",
    ("start", FORWARD, REDUCTION),
    "initial weights|outputs|gradients",
)
def shard_of_another_rank(bug: Seams) -> None:
    def interval(_, self, param):
        size, sharing = param.ds_tensor.numel(), self._shares(param)
        offset = size * (sharing.ranks - 1 - sharing.rank)
        return offset, max(0, min(size, math.prod(self._shapes[param]) - offset))

    bug.around(ShardedWeights, "_interval", interval)


@mutation(
    "allenai/open-instruct#1498: a micro-batch overwrites the sum of those before",
    "zero 3",
    REDUCTION,
    "gradients of weights|reduced gradients",
)
def micro_batches_overwritten(bug: Seams) -> None:
    def end_pass(original, self):
        original(self)
        self._optimizer.micro_step_id = 0

    bug.around(ShardedWeights, "_end_pass", end_pass)


@mutation(
    "deepspeedai/DeepSpeed#4321: a gradient is not reduced during backward",
    "zero 3",
    REDUCTION,
    "gradients of weights|reduced gradients",
)
def a_gradient_handed_over_as_zeros(bug: Seams) -> None:
    def hand_over(original, self, param):
        if self._handed == 1:
            param.grad.zero_()
        original(self, param)

    bug.around(ShardedWeights, "_hand_over", hand_over)


@mutation(OURS + ": gradients of the last group do not reach the host", "offloaded", REDUCTION, "gradients")
def gradients_that_do_not_reach_the_host(bug: Seams) -> None:
    def global_norm(original, self):
        self._weights._masters[-1].grad.zero_()
        return original(self)

    bug.around(Zero, "_global_norm", global_norm)
