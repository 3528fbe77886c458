"""The layouts that a search looks at: every combination of its choices for a number of devices."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from conf.schema import Config, Recompute
from parallel.pipeline.split import SCHEDULES
from train.plan.job import device_kind
from train.plan.search.changes import LIGHTEST, changed, fitted_ramp

MICRO_BATCHES = (1, 2, 4, 8)
CONTEXT_TOKENS = 4096
"""Tokens of a sequence that a rank has at least where ranks share sequences."""
DEEP_EP_RANKS = (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)
"""Sizes of an expert group that DeepEP has a configuration for (its deep_ep/buffer.py)."""
RECOMPUTE = ([], [Recompute.norm, Recompute.swiglu], LIGHTEST, [*LIGHTEST, f"{Recompute.layer}:1"], [Recompute.layer])


@dataclass
class Candidate:
    """One layout, and bounds on what it takes (train/plan/search/bounds.py)."""

    config: Config
    family: str
    """All layouts of one pipeline length and schedule."""
    seconds: float = 0.0
    """Bound on the step; 0 where the bound on memory is more than a device has."""
    least_bytes: int = 0
    """Bound on the memory of the fullest rank."""
    fullest: int = 0
    """The pipeline rank of that bound."""


def candidates(config: Config, devices: int) -> Iterator[Candidate]:
    """Every combination for these devices, whatever the rules say of it."""
    model = config.model
    recompute = [list(what) for what in RECOMPUTE]
    if config.model.recompute not in recompute:
        recompute.append(config.model.recompute)
    selective = [what for what in recompute if set(what) <= set(LIGHTEST)]
    ways = [("flat", "bf16"), ("flat", "fp8"), ("node_limited", "bf16"), ("node_limited", "fp8")]
    with_deep_ep = [*ways, ("deepep", "bf16"), ("deepep", "fp8")]
    can_deep_ep = device_kind(config) == "cuda" and model.hidden % 128 == 0
    spreads = [(pp, cp) for pp in _divisors(devices) for cp in _contexts(config, devices // pp)]
    for pp, cp in spreads:
        dp = devices // (pp * cp)
        for schedule in SCHEDULES if pp > 1 else ("1f1b",):
            family = "pp=1" if pp == 1 else f"pp>{model.layers}" if pp > model.layers else f"pp={pp} {schedule}"
            for ep in (ep for ep in _divisors(dp * cp) if model.experts % ep == 0):
                sent = ways[:1] if ep == 1 else with_deep_ep if can_deep_ep and ep in DEEP_EP_RANKS else ways
                for size, again, (dispatch, wire), zero in product(
                    MICRO_BATCHES, recompute, sent, (1,) if pp > 1 else (1, 2, 3)
                ):
                    if dispatch == "deepep" and again not in selective:
                        continue  # the planner has no trace of DeepEP in a block that runs again
                    one = changed(
                        _ramp(config, size * dp, pp, schedule), pp=pp, dp=dp, cp=cp, ep=ep, schedule=schedule, micro_batch_size=size, recompute=again,
                        dispatch=dispatch, wire=wire, zero=zero, overlap=True,
                    )  # fmt: skip
                    yield Candidate(one, family)


def _contexts(config: Config, ranks: int) -> list[int]:
    """Over how many ranks of a stage sequences may be shared: 1, and more where each still has CONTEXT_TOKENS of one."""
    most = max(config.seq_len // CONTEXT_TOKENS, config.parallel.cp)
    return [cp for cp in _divisors(ranks) if cp <= most and (cp == 1 or config.seq_len % (2 * cp) == 0)]


def _ramp(config: Config, share: int, pp: int, schedule: str) -> Config:
    """The recipe with a ramp for this pipeline; interleaved's micro-batches come in rounds of pp, where the full batch does."""
    if schedule == "interleaved":
        whole = fitted_ramp(config, share * pp, 2)
        if whole is not config:
            return whole
    return fitted_ramp(config, share, 2 * pp)


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]
