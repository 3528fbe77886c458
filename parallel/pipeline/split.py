"""Which layers go to which pipeline stage, which stages to which rank, and what a schedule asks. Pure: no torch.

The slowest stage sets the pace of the whole pipeline, so the split makes the largest stage cost as small as it
can be, exactly, and among all such splits takes the one with the least sum of squared costs (the evenest):

1. largest_S[b]: smallest possible maximum when the first b layers fill S stages, by dynamic programming;
2. the same recursion again for the sum of squares, over the stages that stay within that maximum.

Both are O(stages x layers^2), a few milliseconds for 61 layers. Ties give early stages fewer layers, since early
stages hold the activations of more micro-batches in flight.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from conf.errors import UserError

SCHEDULES = {"1f1b": 1, "interleaved": 2, "zbv": 2, "dualpipev": 2}
"""Schedule names and the number of stages that each rank holds."""

_SLACK = 1e-9
"""Relative: sums of the same costs in another order differ by rounding, and count as ties."""


def stage_placement(schedule: str, pp: int) -> list[list[int]]:
    """Stage numbers of every pipeline rank, ascending.

    1f1b: [r]; interleaved: [r, r + pp]; zbv and dualpipev fold the stages into a V, [r, 2 pp - 1 - r], so that the
    first and the last stage share rank 0 (with the embedding and the head, which are tied for free there).
    """
    if schedule == "1f1b":
        return [[r] for r in range(pp)]
    if schedule == "interleaved":
        return [[r, r + pp] for r in range(pp)]
    assert schedule in SCHEDULES, schedule
    return [[r, 2 * pp - 1 - r] for r in range(pp)]


def check_schedule(name: str, pp: int, micro_batches: int, layers: int) -> None:
    """Raise UserError when the schedule cannot run with these sizes. Pure; called before anything starts.

    micro_batches: micro-batches per step and data-parallel rank, batch_size / (micro_batch_size x dp).
    """
    if name not in SCHEDULES:
        raise UserError("parallel.schedule", name, "must be a known schedule", f"use one of {', '.join(SCHEDULES)}")
    stages = pp * SCHEDULES[name]
    if layers < stages:
        raise UserError(
            "parallel.pp",
            f"{pp} with parallel.schedule={name}",
            f"{name} makes {stages} stages of at least one layer, and model.layers={layers}",
            f"use parallel.pp <= {layers // SCHEDULES[name]}, or model.layers >= {stages}",
        )
    rounds = max(1, micro_batches // pp)
    least = {"1f1b": pp, "dualpipev": 2 * pp}.get(name, 1)
    if micro_batches < least:
        rule = f"{name} needs at least {least} micro-batches to fill {pp} pipeline ranks"
    elif name == "interleaved" and micro_batches % rounds:
        rule = f"interleaved needs micro-batches that {rounds} rounds of about {pp} divide (a multiple of pp is safe)"
    else:
        return
    raise UserError(
        "batch_size",
        f"{micro_batches} micro-batches per step and data-parallel rank",
        rule,
        "change batch_size, micro_batch_size or parallel.dp (micro-batches = batch_size / (micro_batch_size x dp)), "
        "or choose another parallel.schedule",
    )


def split_layers(costs: Sequence[float], first_cost: float, last_cost: float, stages: int) -> list[range]:
    """Contiguous layers of every stage, at least one each, with the smallest possible largest stage cost.

    costs: cost of every layer, in any unit; first_cost: extra cost of the first stage (embedding); last_cost: extra
    cost of the last stage (head, loss and MTP modules), in the same unit. Raises UserError when layers < stages.
    """
    layers = len(costs)
    if layers < stages:
        raise UserError(
            "parallel.pp",
            f"{stages} stages for {layers} layers",
            f"every pipeline stage needs at least one layer, and {stages} stages are more than model.layers={layers}",
            f"use parallel.pp so that pp x stages per rank <= {layers} ({_per_rank()}), or more model.layers",
        )
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)

    def stage_cost(stage: int, begin: int, end: int) -> float:
        extra = first_cost * (stage == 0) + last_cost * (stage == stages - 1)
        return before[end] - before[begin] + extra

    largest, _ = _best(layers, stages, stage_cost, max)
    limit = largest * (1 + _SLACK)

    def squared_cost(stage: int, begin: int, end: int) -> float:
        cost = stage_cost(stage, begin, end)
        return cost * cost if cost <= limit else math.inf

    _, bounds = _best(layers, stages, squared_cost, lambda total, cost: total + cost)
    return [range(begin, end) for begin, end in pairwise(bounds)]


def _best(
    layers: int, stages: int, cost: Callable[[int, int, int], float], join: Callable[[float, float], float]
) -> tuple[float, list[int]]:
    """Smallest joined cost of all splits, and the stage bounds [0, ..., layers] that reach it."""
    best = [0.0] + [math.inf] * layers
    origins: list[list[int]] = []
    for stage in range(stages):
        current, origin = [math.inf] * (layers + 1), [-1] * (layers + 1)
        for end in range(stage + 1, layers - (stages - stage - 1) + 1):
            for begin in range(stage, end):
                total = join(best[begin], cost(stage, begin, end))
                if total < current[end] * (1 - _SLACK):
                    current[end], origin[end] = total, begin
        best = current
        origins.append(origin)
    bounds = [layers]
    for origin in reversed(origins):
        bounds.append(origin[bounds[-1]])
    return best[layers], bounds[::-1]


def _per_rank() -> str:
    return ", ".join(f"{name} holds {count} a rank" for name, count in SCHEDULES.items())
