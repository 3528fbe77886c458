"""Bounds for the difference between two correct computations of the same quantity, with reasons.

u is the unit roundoff of a format: rounding changes a result by at most u, relative. A chain of n matmuls with sums of
K terms rounds about n sqrt(K) times in the direction in which errors usually add up.
"""

from dataclasses import dataclass

from conf.schema import Config, Model

EXACT = 1e-10
"""Bound of check exact, relative to the tensor's largest value."""
UNIT = {"fp64": 2.0**-53, "fp32": 2.0**-24, "bf16": 2.0**-8, "e4m3": 2.0**-4}
SMALLEST = 2.0**-126
"""Smaller values in fp32 or bf16 are rounded with less than the format's precision, or to 0."""
LOW = ("recipe", "tiles")
"""Checks in the recipe's own precision."""
MOST = 0.75
"""Largest bound in low precision, for any chain: a missing or doubled value has an error of 1."""
ROOM = 8.0
"""Factor by which norms, softmax and the router's sigmoid may enlarge an error."""


@dataclass(frozen=True)
class Bound:
    """The largest allowed difference."""

    value: float
    reason: str


def chain(model: Model) -> int:
    """Number of matmuls from a token to the loss and back: 8 per block and direction (attention six, FFN two), and the
    head."""
    return 2 * (8 * (model.layers + model.mtp_depth) + 1)


def terms(config: Config) -> int:
    """Number of terms of the longest sum: over a width, over a vocabulary, or over the tokens of a batch."""
    model = config.model
    return max(model.hidden, model.dense_width, model.vocab_size, config.batch_size * config.seq_len)


def computed(proof: str, config: Config) -> Bound:
    """Bound of outputs, losses and gradients in a check: the rounding errors of the chain of matmuls."""
    if proof == "exact":
        return Bound(EXACT, "fp64 rounds by 1e-16, and sums in any order differ by much less than this bound")
    n, K = chain(config.model), terms(config)
    if proof == "fp32":
        value = ROOM * UNIT["fp32"] * (n * K) ** 0.5
        return Bound(value, f"{ROOM:g} x 2^-24 x sqrt({n} matmuls x {K} terms)")
    name = coarsest(config)
    if name == "fp32":
        return computed("fp32", config)
    value = min(MOST, 2 * UNIT[name] * n**0.5)
    return Bound(
        value, f"2 x unit roundoff {UNIT[name]:g} of {name} x sqrt({n} matmuls), at most {MOST:g}, of the norm"
    )


def is_tiled(config: Config) -> bool:
    """Whether the matmuls or the wire use FP8."""
    return config.precision.fp8 is not None or config.parallel.wire == "fp8"


def coarsest(config: Config) -> str:
    """The format in UNIT with the coarsest rounding of a recipe. An FP8 wire rounds rows for the experts in any
    precision."""
    if is_tiled(config):
        return "e4m3"
    return "bf16" if config.precision.name != "fp32" else "fp32"


def averaged(proof: str, config: Config, sequences: int) -> Bound:
    """Bound of losses. In low precision, tokens have independent rounding errors, which average out in a mean."""
    bound, tokens = computed(proof, config), sequences * config.seq_len
    if not is_rounded(proof, config):
        return bound
    return Bound(2 * bound.value / tokens**0.5, f"{bound.reason}, x 2 / sqrt({tokens} tokens)")


def chosen(proof: str, config: Config) -> Bound:
    """Largest error of scores for which a different expert choice is correct.

    The slope of a sigmoid is at most a quarter. If all logits change, a softmax score changes by at most twice as much.
    """
    if proof == "exact":
        return Bound(0.0, "the same experts in the same order")
    slope = 2 if config.model.scores == "softmax" else 4
    return Bound(
        computed(proof, config).value / slope,
        f"the bound of outputs, times the slope 1/{slope} of a {config.model.scores}",
    )


def is_rounded(proof: str, config: Config) -> bool:
    """Whether a format below fp32 is used, so outputs and gradients are measured by their norm."""
    return proof in LOW and coarsest(config) != "fp32"


def is_low(proof: str, config: Config) -> bool:
    """Whether the model computes with bf16 weights."""
    return proof in LOW and config.precision.name != "fp32"
