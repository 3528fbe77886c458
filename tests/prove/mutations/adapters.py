"""Adapters: what pairs add to a product, what learns, and what stays as it was."""

import torch

from conf.schema import Adapter
from parallel.zero.engine import Zero
from tests.prove.mutations.registry import BACKWARD, FORWARD, OURS, RESUME, UPDATE, mutation
from tests.prove.mutations.seams import Seams
from train import parallelize
from train.kernels.fp8.frozen_blocks import FrozenBlocks
from train.model import adapter
from train.model.adapter import LowRankPairs
from train.model.recompute import RecomputedOutputs

PAIRS = "lora"


@mutation("Blaizzy/mlx-vlm#845: alpha in the place of alpha / rank", "adapters", FORWARD, "output|layers|mtp|loss")
def scale_without_the_rank(bug: Seams) -> None:
    bug.around(Adapter, "scale", lambda original, self: self.alpha)


@mutation(
    "vllm-project/vllm#55545: alpha over the rank and, as in rsLoRA, over its root are taken for each other",
    "adapters",
    FORWARD,
    "output|layers|mtp|loss",
)
def scale_by_the_root(bug: Seams) -> None:
    bug.around(Adapter, "scale", lambda original, self: self.alpha / self.rank**0.5)


@mutation(OURS + ": experts take the A of their neighbour", "adapters", FORWARD, "output|layers|experts|moe|loss")
def first_factor_of_another_expert(bug: Seams) -> None:
    def product(original, self, x, weight, groups):
        is_first = groups is not None and any(weight is getattr(self._module, pair.a) for pair in self._names)
        return original(self, x, weight.roll(1, 0) if is_first else weight, groups)

    bug.around(LowRankPairs, "_product", product)


@mutation(OURS + ": gate and up projection change pairs", "adapters", FORWARD, "output|layers|w13|loss")
def pairs_of_gate_and_up_change_places(bug: Seams) -> None:
    bug.around(adapter, "name_pairs", lambda original, base: original(base)[::-1])


@mutation(OURS + ": MTP modules compute without their pairs", "adapters", FORWARD, "mtp|loss")
def pairs_of_mtp_left_out(bug: Seams) -> None:
    def add(original, self, y, x, groups=None):
        return y if "mtp" in self._salt else original(self, y, x, groups)

    bug.around(LowRankPairs, "add", add)


@mutation(
    OURS + ": values of a base in blocks forget their scales", "adapters in blocks", FORWARD, "output|layers|loss"
)
def blocks_without_scales(bug: Seams) -> None:
    def parts(original, self, row):
        scale, codes = original(self, row)
        return torch.full_like(scale, 1 / 448), codes

    bug.around(FrozenBlocks, "_parts", parts)


@mutation(OURS + ": backward makes other values of a base in blocks", "adapters in blocks", BACKWARD, PAIRS, "fp32")
def blocks_made_otherwise_in_backward(bug: Seams) -> None:
    def unpack(original, self, dtype):
        values, _ = original(self, dtype)
        return values, RecomputedOutputs(lambda: 2 * self._values(dtype), (), values)

    bug.around(FrozenBlocks, "unpack", unpack)


@mutation(
    OURS + ": the base is trained too, with moments and a share of the norm",
    "adapters",
    "start",
    r"state exp_avg\.(?!.*lora)",
)
def base_trained(bug: Seams) -> None:
    def add_adapters(original, chunk, section, kernels, seed):
        original(chunk, section, kernels, seed)
        for param in set(chunk.parameters()) - {*chunk.embedding.parameters()}:
            param.requires_grad_(True)

    bug.around(parallelize, "add_adapters", add_adapters)


@mutation(OURS + ": what is in front learns nothing through the pairs", "adapters", BACKWARD, PAIRS)
def inputs_learn_nothing(bug: Seams) -> None:
    bug.around(LowRankPairs, "add", lambda original, self, y, x, groups=None: original(self, y, x.detach(), groups))


@mutation(
    "NVIDIA-NeMo/Megatron-Bridge#5634: what pairs of experts give is detached, and they learn nothing",
    "adapters",
    BACKWARD,
    PAIRS,
)
def pairs_of_experts_detached(bug: Seams) -> None:
    def add(original, self, y, x, groups=None):
        added = original(self, y, x, groups) - y
        return y + (added if groups is None else added.detach() + 0 * added)

    bug.around(LowRankPairs, "add", add)


@mutation(
    OURS + ": weights decay where only a product with them is trained", "adapters", FORWARD, "output|master", "fp32"
)
def base_decays(bug: Seams) -> None:
    def step(original, self, *given, **more):
        done = original(self, *given, **more)
        with torch.no_grad():
            for param in self.untrained:
                param.mul_(0.99)
        return done

    bug.around(Zero, "step", step)


@mutation(
    OURS + ": after a resume experts have the pairs of their neighbours",
    "adapters",
    (UPDATE, RESUME),
    f"{PAIRS}|master",
)
def pairs_of_the_neighbour_after_a_resume(bug: Seams) -> None:
    def finish(original, self, updates):
        if updates:
            for name, shard in self.shards(copies=True).items():
                if name.startswith("master.") and ".experts." in name:
                    shard.local.copy_(shard.local.roll(shard.local.numel() // 2))
        original(self, updates)

    bug.around(Zero, "finish_load", finish)
