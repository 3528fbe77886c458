"""Adapters: what LoRA A and B add to a matmul, which weights learn, and which stay unchanged."""

from dataclasses import replace

import torch
import torch.distributed as dist

from conf.schema import Adapter
from parallel.expert.dispatcher import PendingDispatch
from parallel.zero.engine import Zero
from tests.prove.mutations.registry import BACKWARD, FORWARD, OURS, RESUME, UPDATE, mutation
from tests.prove.mutations.seams import Seams
from train import parallelize
from train.kernels.fp8 import linear
from train.kernels.fp8.compiled_engine import CompiledEngine
from train.kernels.fp8.frozen_blocks import FrozenBlocks
from train.model import adapter
from train.model.adapter import LoraWeights
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
    def matmul(original, self, x, weight, groups):
        is_first = groups is not None and any(weight is getattr(self._module, pair.a) for pair in self._names)
        return original(self, x, weight.roll(1, 0) if is_first else weight, groups)

    bug.around(LoraWeights, "_matmul", matmul)


@mutation(OURS + ": gate and up projection change pairs", "adapters", FORWARD, "output|layers|w13|loss")
def pairs_of_gate_and_up_change_places(bug: Seams) -> None:
    bug.around(adapter, "name_lora", lambda original, base: original(base)[::-1])


@mutation(OURS + ": MTP modules compute without their pairs", "adapters", FORWARD, "mtp|loss")
def pairs_of_mtp_left_out(bug: Seams) -> None:
    def add(original, self, y, x, groups=None):
        return y if "mtp" in self._salt else original(self, y, x, groups)

    bug.around(LoraWeights, "add", add)


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
    bug.around(LoraWeights, "add", lambda original, self, y, x, groups=None: original(self, y, x.detach(), groups))


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

    bug.around(LoraWeights, "add", add)


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


# --- In the recipe's own precision, part by part ----------------------------------------------------------------------

LOW, MATMULS = "recipe", "matmuls"


def of_base(bug: Seams, change) -> None:
    """change(rows) after products of experts with the base, in FP8."""
    bug.around(CompiledEngine, "grouped", lambda original, self, *given: change(original(self, *given)))


@mutation(OURS + ": products of experts of a base in FP8 are 1.3 times as large", "adapters fp8", FORWARD, MATMULS, LOW)
def base_of_experts_times_1_3(bug: Seams) -> None:
    of_base(bug, lambda rows: rows * 1.3)


@mutation(OURS + ": products of experts of a base in FP8 are 0", "adapters fp8", FORWARD, MATMULS, LOW)
def base_of_experts_of_0(bug: Seams) -> None:
    of_base(bug, torch.zeros_like)


@mutation(OURS + ": rows of experts arrive rolled by one", "adapters fp8", FORWARD, "rows at the experts", LOW)
def rows_rolled_by_one(bug: Seams) -> None:
    def wait(original, self):
        routed = original(self)
        return replace(routed, rows_RD=routed.rows_RD.roll(1, 0))

    bug.around(PendingDispatch, "wait", wait)


def of_second(bug: Seams, change) -> None:
    """change(self, y, x, groups, add) in the place of what the pairs of experts' second product add."""

    def add(original, self, y, x, groups=None):
        is_down = groups is not None and "w2" in self._salt
        return change(self, y, x, groups, original) if is_down else original(self, y, x, groups)

    bug.around(LoraWeights, "add", add)


@mutation(OURS + ": experts have no pairs of their second product", "adapters fp8", FORWARD, MATMULS, LOW)
def no_pairs_of_down(bug: Seams) -> None:
    of_second(bug, lambda self, y, x, groups, add: y)


@mutation(OURS + ": experts have no pairs of their first product", "adapters fp8", FORWARD, MATMULS, LOW)
def no_pairs_of_up(bug: Seams) -> None:
    def add(original, self, y, x, groups=None):
        return y if groups is not None and "w13" in self._salt else original(self, y, x, groups)

    bug.around(LoraWeights, "add", add)


@mutation(OURS + ": pairs of experts' second product take SwiGLU without gates", "adapters fp8", FORWARD, MATMULS, LOW)
def pairs_of_down_without_gates(bug: Seams) -> None:
    bug.around(linear, "swiglu_of", lambda original, h, gates, kernels: original(h, torch.ones_like(gates), kernels))


@mutation(OURS + ": Dgrad of linear layers beside pairs is 0.6 times as large", "adapters fp8", BACKWARD, MATMULS, LOW)
def dgrad_times_06(bug: Seams) -> None:
    def backward(original, ctx, dy):
        dx, *rest = original(ctx, dy)
        return (None if dx is None else dx * 0.6, *rest)

    bug.around(linear._Linear, "backward", backward)


@mutation(OURS + ": a rank keeps its pairs of before every update", "adapters bf16", FORWARD, f"{MATMULS}|output", LOW)
def a_rank_keeps_its_pairs(bug: Seams) -> None:
    def step(original, self, *given, **more):
        held = {param: param.detach().clone() for param in self.engine.module.parameters() if param.requires_grad}
        done = original(self, *given, **more)
        if dist.get_rank() == 1:
            for param, before in held.items():
                param.data.copy_(before)
        return done

    bug.around(Zero, "step", step)


@mutation(
    OURS + ": gradients of experts' pairs are 0.8 times as large", "adapters bf16", BACKWARD, "gradients of single", LOW
)
def gradients_of_experts_pairs_times_08(bug: Seams) -> None:
    def matmul(original, self, x, weight, groups):
        return original(
            self, x, weight if groups is None else weight.detach() + 0.8 * (weight - weight.detach()), groups
        )

    bug.around(LoraWeights, "_matmul", matmul)


@mutation(OURS + ": what pairs add is rounded through FP8", "adapters bf16", FORWARD, MATMULS, LOW)
def pairs_in_fp8(bug: Seams) -> None:
    def add(original, self, y, x, groups=None):
        return original(self, y, x + (x.to(torch.float8_e4m3fn).to(x.dtype) - x).detach(), groups)

    bug.around(LoraWeights, "add", add)


def dropped(bug: Seams, change) -> None:
    """change(dropped, x, share) after dropout."""
    bug.around(adapter, "_drop", lambda original, x, share, salt: change(original(x, share, salt), x, share))


@mutation(OURS + ": dropout does not scale up what it keeps", "adapters dropped", FORWARD, "dropout", "tiles")
def dropout_without_scaling(bug: Seams) -> None:
    dropped(bug, lambda kept, x, share: kept * (1 - share))


@mutation(OURS + ": dropout drops nothing", "adapters dropped", FORWARD, "dropout", "tiles")
def dropout_drops_nothing(bug: Seams) -> None:
    dropped(bug, lambda kept, x, share: x.clone())


@mutation(OURS + ": dropout keeps the share that it should drop", "adapters dropped", FORWARD, "dropout", "tiles")
def dropout_the_other_way(bug: Seams) -> None:
    dropped(bug, lambda kept, x, share: torch.where(kept == 0, x / (1 - share), 0))


@mutation(OURS + ": a block's scale of a base in FP8 is its neighbour's", "adapters dropped", FORWARD, MATMULS, "tiles")
def scale_of_the_next_block(bug: Seams) -> None:
    def parts(original, self, row):
        scale, codes = original(self, row)
        return scale.flip(-1), codes

    bug.around(FrozenBlocks, "_parts", parts)
