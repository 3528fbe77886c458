"""Low-rank adapters: which parameters of the model each target adapts, and what the parameters of an adapter are called. No torch.

An adapted product is y = W x + (alpha / rank) B (A dropout(x)), and W stays as it is (LoRA, arXiv 2106.09685). A is drawn and B is 0
at the start. What stands in one parameter of ours and is several matrices has a pair for each of them: w13 holds w1 and w3, and
every routed expert has its own.

    base                    its pairs
    q_up.weight  (O, I)     q_up.lora_A (rank, I)                  q_up.lora_B (O, rank)
    w13.weight  (2F, D)     w13.w1_lora_A, w13.w3_lora_A (rank, D) w13.w1_lora_B, w13.w3_lora_B (F, rank)
    experts.w13 (E, 2F, D)  experts.w1_lora_A, experts.w3_lora_A (E, rank, D), and _B (E, F, rank)
    experts.w2  (E, D, F)   experts.w2_lora_A (E, rank, F)         experts.w2_lora_B (E, D, rank)
    head.weight  (V, D)     head.lora_A (rank, D)                  head.lora_B (V, rank)
"""

from typing import NamedTuple

ADAPTER_TARGETS: dict[str, tuple[str, ...]] = {
    "q_up": ("attention.q_up.weight", "attention.q.weight"),  # without a query latent, q is all there is
    "kv_up": ("attention.kv_up.weight",),
    "down": ("attention.q_down.weight", "attention.kv_down.weight"),
    "out": ("attention.out.weight",),
    "routed": ("moe.experts.w13", "moe.experts.w2"),
    "shared": ("moe.shared.w13.weight", "moe.shared.w2.weight"),
    "dense": ("ffn.w13.weight", "ffn.w2.weight"),
    "head": ("head.weight",),
}
"""By target: how the names of the base parameters end that it adapts, in blocks of MTP modules too."""
ON_REQUEST = ("head",)
"""Targets that are adapted only where they are named."""


class LowRankNames(NamedTuple):
    """The two parameters of one pair."""

    a: str
    """Name of A: (rank, inputs), with the experts of this rank in front where they are stacked."""
    b: str
    """Name of B: (outputs, rank), with the experts in front as in A."""


def target_of(base: str) -> str | None:
    """The target that adapts the base parameter of this global name; None for one that nothing adapts."""
    return next(
        (target for target, ends in ADAPTER_TARGETS.items() if f".{base}".endswith(tuple(f".{end}" for end in ends))),
        None,
    )


def is_held_in_blocks(base: str) -> bool:
    """Whether adapter.base=fp8 holds the base parameter of this name as block FP8: those of the products that precision.fp8 casts."""
    return target_of(base) not in (None, *ON_REQUEST)


def name_pairs(base: str) -> list[LowRankNames]:
    """The pairs of an adapted base parameter: one, or for w13 those of w1 and of w3, which each give half of its outputs."""
    stem, _, last = base.rpartition(".")
    is_weight = last == "weight"
    matrix = stem.rpartition(".")[2] if is_weight else last
    words = ["w1_", "w3_"] if matrix == "w13" else [""] if is_weight else [f"{last}_"]
    return [LowRankNames(f"{stem}.{word}lora_A", f"{stem}.{word}lora_B") for word in words]


def is_adapter(name: str) -> bool:
    """Whether this is the name of a parameter of an adapter."""
    return name.endswith(("lora_A", "lora_B"))
