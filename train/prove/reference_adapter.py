"""Reference for LoRA adapters: an adapted matrix W becomes W + alpha / rank B A. Only A and B are trained.

w13 stacks w1 and w3 along the outputs; each has its own A and B, in every expert.

Shapes: O outputs, I inputs, E experts, F inner width.
"""

import torch
from torch import Tensor

from train.prove.recipe_values import Values

ADAPTED_ENDS = {
    "q_up": ("attention.q.weight", "attention.q_up.weight"),
    "kv_up": ("attention.kv_up.weight",),
    "down": ("attention.q_down.weight", "attention.kv_down.weight"),
    "out": ("attention.out.weight",),
    "routed": ("moe.experts.w13", "moe.experts.w2"),
    "shared": ("moe.shared.w13.weight", "moe.shared.w2.weight"),
    "dense": ("ffn.w13.weight", "ffn.w2.weight"),
    "head": ("head.weight",),
}
"""Suffixes of the weights that each adapter target adapts."""


def is_adapted(config: Values) -> bool:
    """Returns whether the recipe trains only LoRA A and B."""
    return config.adapter.name != "none"


def lora_prefixes(config: Values, weight: str) -> list[str]:
    """Returns the name prefixes of A and B for each matrix in the weight."""
    targets = config.adapter.targets or ()
    if not is_adapted(config) or not any(weight.endswith(end) for target in targets for end in ADAPTED_ENDS[target]):
        return []
    if weight.endswith(".experts.w13"):
        return [weight[:-3] + "w1_lora_", weight[:-3] + "w3_lora_"]
    if weight.endswith(".experts.w2"):
        return [weight + "_lora_"]
    module = weight.removesuffix("weight")
    return [module + "w1_lora_", module + "w3_lora_"] if module.endswith(".w13.") else [module + "lora_"]


def is_stored_in_blocks(name: str) -> bool:
    """Returns whether adapter.base=fp8 stores this weight in FP8 blocks."""
    return any(name.endswith(end) for target, ends in ADAPTED_ENDS.items() if target != "head" for end in ends)


def in_blocks(weight: Tensor) -> Tensor:
    """Returns the weight after a cast to E4M3 in 128x128 blocks."""
    found = torch.empty_like(weight)
    for top in range(0, weight.shape[-2], 128):
        for left in range(0, weight.shape[-1], 128):
            block = weight[..., top : top + 128, left : left + 128]
            scale = block.abs().amax((-2, -1), keepdim=True).clamp_min(1e-4) / 448
            found[..., top : top + 128, left : left + 128] = (block / scale).to(torch.float8_e4m3fn).float() * scale
    return found


def adapter_shapes(config: Values, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all A (rank, I) and B (O, rank). For experts, E is the first dimension.

    shapes: shapes of the model's weights.
    """
    found: dict[str, tuple[int, ...]] = {}
    for weight, (*experts, outputs, inputs) in ((name, shape) for name, shape in shapes.items() if len(shape) > 1):
        prefixes = lora_prefixes(config, weight)
        for prefix in prefixes:
            found[f"{prefix}A"] = (*experts, config.adapter.rank, inputs)
            found[f"{prefix}B"] = (*experts, outputs // len(prefixes), config.adapter.rank)
    return found


def adapted(config: Values, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the model's weights, including the adapter's change."""
    scale, found = config.adapter.alpha / config.adapter.rank, dict(weights)
    for name in weights:
        if prefixes := lora_prefixes(config, name):
            products = [weights[f"{prefix}B"] @ weights[f"{prefix}A"] for prefix in prefixes]
            found[name] = weights[name] + scale * torch.cat(products, -2)
    return found
