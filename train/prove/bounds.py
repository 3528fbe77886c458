"""How far two honest computations of the same quantity may be apart, and why.

u is the unit roundoff of a format: a rounded result is off by at most u of itself. A chain of n products whose sums have K
terms rounds n sqrt(K) times on the way that errors usually add up.
"""

from dataclasses import dataclass

from conf.schema import Config, Model

EXACT = 1e-10
"""Pass exact: of the tensor's largest value."""
UNIT = {"fp64": 2.0**-53, "fp32": 2.0**-24, "bf16": 2.0**-8, "e4m3": 2.0**-4}
SMALLEST = 2.0**-126
"""What is smaller in fp32 or bf16 is rounded to steps of less than the format's precision, or to 0."""
LOW = ("recipe", "tiles")
"""Passes in the recipe's own precision."""
MOST = 0.75
"""In low precision, whatever the chain: what is missing or doubled is off by 1."""
ROOM = 8.0
"""What norms, softmax and the router's sigmoid may enlarge an error by on its way."""


@dataclass(frozen=True)
class Bound:
    """Largest difference that is allowed."""

    value: float
    reason: str


def chain(model: Model) -> int:
    """Products between a token and the loss and back: 8 of a block each way (attention has six, an FFN two), and the head."""
    return 2 * (8 * (model.layers + model.mtp_depth) + 1)


def terms(config: Config) -> int:
    """Terms of the longest sum: over a width, over a vocabulary, or over the tokens of a batch."""
    model = config.model
    return max(model.hidden, model.dense_width, model.vocab_size, config.batch_size * config.seq_len)


def computed(proof: str, config: Config) -> Bound:
    """Outputs, losses and gradients of a pass: what the chain of products makes of rounding."""
    if proof == "exact":
        return Bound(EXACT, "fp64 rounds by 1e-16, and sums of any order stay far below")
    n, K = chain(config.model), terms(config)
    if proof == "fp32":
        value = ROOM * UNIT["fp32"] * (n * K) ** 0.5
        return Bound(value, f"{ROOM:g} x 2^-24 x sqrt({n} products x {K} terms)")
    name = coarsest(config)
    if name == "fp32":
        return computed("fp32", config)
    value = min(MOST, 2 * UNIT[name] * n**0.5)
    return Bound(
        value, f"2 x unit roundoff {UNIT[name]:g} of {name} x sqrt({n} products), at most {MOST:g}, of the norm"
    )


def is_tiled(config: Config) -> bool:
    """Whether products are in FP8, or rows travel so."""
    return config.precision.fp8 is not None or config.parallel.wire == "fp8"


def coarsest(config: Config) -> str:
    """The format of UNIT in which a recipe rounds most. A wire of FP8 rounds on the way to the experts, in any precision."""
    if is_tiled(config):
        return "e4m3"
    return "bf16" if config.precision.name != "fp32" else "fp32"


def averaged(proof: str, config: Config, sequences: int) -> Bound:
    """Losses: in low precision the roundings of one token are not those of another, and a mean has fewer of them."""
    bound, tokens = computed(proof, config), sequences * config.seq_len
    if not is_rounded(proof, config):
        return bound
    return Bound(2 * bound.value / tokens**0.5, f"{bound.reason}, x 2 / sqrt({tokens} tokens)")


def chosen(proof: str, config: Config) -> Bound:
    """By how much scores may be off for an expert to be chosen in the place of another: a sigmoid's slope is a quarter, and what a
    softmax's score moves by when all logits move is no more than twice that.
    """
    if proof == "exact":
        return Bound(0.0, "the same experts in the same order")
    slope = 2 if config.model.scores == "softmax" else 4
    return Bound(
        computed(proof, config).value / slope,
        f"what outputs may be off by, times a {config.model.scores}'s slope of 1/{slope}",
    )


def is_rounded(proof: str, config: Config) -> bool:
    """Whether a format below fp32 takes part, so that outputs and gradients are measured by their norm."""
    return proof in LOW and coarsest(config) != "fp32"


def is_low(proof: str, config: Config) -> bool:
    """Whether the model computes with weights in bf16."""
    return proof in LOW and config.precision.name != "fp32"
