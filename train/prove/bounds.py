"""Bounds on the difference between two correct computations, for mode=prove.

u is the unit roundoff: the largest relative error of one rounding. In n chained matmuls with K terms per sum, errors
usually add up to about u sqrt(n K).
"""

from dataclasses import dataclass

from conf.schema import Config, Model

EXACT = 1e-10
"""Bound of check `exact`, relative to the tensor's largest magnitude."""
UNIT = {"fp64": 2.0**-53, "fp32": 2.0**-24, "bf16": 2.0**-8, "e4m3": 2.0**-4}
SMALLEST = 2.0**-126
"""Smallest normal number of fp32 and of bf16."""
LOW = ("recipe", "tiles")
"""Checks that compute in the recipe's number formats."""
MOST = 0.75
"""Upper limit of a bound in low precision."""
ROOM = 8.0
"""Factor by which nonlinear functions may enlarge an error."""


@dataclass(frozen=True)
class Bound:
    """The largest allowed difference, and the reason for it."""

    value: float
    reason: str


def chain(model: Model) -> int:
    """Returns the number of matmuls in forward and backward."""
    return 2 * (8 * (model.layers + model.mtp_depth) + 1)


def terms(config: Config) -> int:
    """Returns the length of the longest sum in a step."""
    model = config.model
    return max(model.hidden, model.dense_width, model.vocab_size, config.batch_size * config.seq_len)


def computed(proof: str, config: Config) -> Bound:
    """Returns the bound on rounding errors of outputs, losses and gradients."""
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
    """Returns whether the matmuls or the wire use FP8."""
    return config.precision.fp8 is not None or config.parallel.wire == "fp8"


def coarsest(config: Config) -> str:
    """Returns the recipe's coarsest number format; an FP8 wire format counts too."""
    if is_tiled(config):
        return "e4m3"
    return "bf16" if config.precision.name != "fp32" else "fp32"


def averaged(proof: str, config: Config, sequences: int) -> Bound:
    """Returns the bound on errors of losses, which are means."""
    bound, tokens = computed(proof, config), sequences * config.seq_len
    if not is_rounded(proof, config):
        return bound
    return Bound(2 * bound.value / tokens**0.5, f"{bound.reason}, x 2 / sqrt({tokens} tokens)")


def chosen(proof: str, config: Config) -> Bound:
    """Returns the bound on the error of the router's scores."""
    if proof == "exact":
        return Bound(0.0, "the same experts in the same order")
    slope = 2 if config.model.scores == "softmax" else 4
    return Bound(
        computed(proof, config).value / slope,
        f"the bound of outputs, times the slope 1/{slope} of a {config.model.scores}",
    )


def is_rounded(proof: str, config: Config) -> bool:
    """Returns whether the check computes in a format below fp32."""
    return proof in LOW and coarsest(config) != "fp32"


def is_low(proof: str, config: Config) -> bool:
    """Returns whether the model computes with bf16 weights in this check."""
    return proof in LOW and config.precision.name != "fp32"
