"""Low-rank adapters (LoRA, arXiv 2106.09685): the weights that can be adapted, and the names of A and B. Imports no
torch.

An adapted matmul is y = W x + (alpha / rank) B (A dropout(x)), with frozen W. Initially A is random and B is 0. Some
parameters stack matrices, such as w1 and w3 in w13. Every stacked matrix has its own A and B.

    adapted parameter       names and shapes of its A and B
    q_up.weight  (O, I)     q_up.lora_A (rank, I)                  q_up.lora_B (O, rank)
    w13.weight  (2F, D)     w13.w1_lora_A, w13.w3_lora_A (rank, D) w13.w1_lora_B, w13.w3_lora_B (F, rank)
    experts.w13 (E, 2F, D)  experts.w1_lora_A, experts.w3_lora_A (E, rank, D), and _B (E, F, rank)
    experts.w2  (E, D, F)   experts.w2_lora_A (E, rank, F)         experts.w2_lora_B (E, D, rank)
    head.weight  (V, D)     head.lora_A (rank, D)                  head.lora_B (V, rank)
"""

from typing import NamedTuple

ADAPTER_TARGETS: dict[str, tuple[str, ...]] = {
    "q_up": ("attention.q_up.weight", "attention.q.weight"),  # attention.q: models without query latent
    "kv_up": ("attention.kv_up.weight",),
    "down": ("attention.q_down.weight", "attention.kv_down.weight"),
    "out": ("attention.out.weight",),
    "routed": ("moe.experts.w13", "moe.experts.w2"),
    "shared": ("moe.shared.w13.weight", "moe.shared.w2.weight"),
    "dense": ("ffn.w13.weight", "ffn.w2.weight"),
    "head": ("head.weight",),
}
"""Maps a word of adapter.targets to the name endings of the parameters that it selects."""
ON_REQUEST = ("head",)
"""Targets that a run adapts only if adapter.targets names them."""


class LoraNames(NamedTuple):
    """Names of LoRA A and B of one adapted matrix."""

    a: str
    """Name of A, of shape (rank, inputs); for stacked experts, (local experts, rank, inputs)."""
    b: str
    """Name of B, of shape (outputs, rank); for stacked experts, (local experts, outputs, rank)."""


def target_of(base: str) -> str | None:
    """Return the word of adapter.targets that selects the parameter with the global name `base`, or None."""
    return next(
        (target for target, ends in ADAPTER_TARGETS.items() if f".{base}".endswith(tuple(f".{end}" for end in ends))),
        None,
    )


def is_held_in_blocks(base: str) -> bool:
    """Whether adapter.base=fp8 stores this parameter of the frozen model in FP8 blocks."""
    return target_of(base) not in (None, *ON_REQUEST)


def name_lora(base: str) -> list[LoraNames]:
    """Return the names of A and B for each matrix in the adapted parameter `base`."""
    stem, _, last = base.rpartition(".")
    is_weight = last == "weight"
    matrix = stem.rpartition(".")[2] if is_weight else last
    words = ["w1_", "w3_"] if matrix == "w13" else [""] if is_weight else [f"{last}_"]
    return [LoraNames(f"{stem}.{word}lora_A", f"{stem}.{word}lora_B") for word in words]


def is_adapter(name: str) -> bool:
    """Whether this is the name of an adapter parameter."""
    return name.endswith(("lora_A", "lora_B"))
