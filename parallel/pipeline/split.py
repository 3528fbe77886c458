"""Assigns layers to pipeline stages, and so to ranks. Does not import torch.

The rank with the most work, in one stage or two, determines the pipeline's speed. The split starts from equal numbers
of layers. Each improving step moves one layer from one stage to another: every stage between the two passes one layer
on. Splits are compared by these values, in this order; smaller is better:

    1. the maximum cost of a rank
    2. the sum of the squared costs of ranks
    3. the sum of the squared costs of stages
    4. the number of layers in early stages, which hold the activations of more micro-batches

With equal costs of layers, the result is optimal.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise, permutations


def split_layers_evenly(layers: int, stages: int) -> list[range]:
    """Return each stage's layers, in nearly equal numbers. If there are fewer layers than stages, the first and the
    last stage have none."""
    bounds = [layers * stage // stages for stage in range(stages + 1)]
    if stages > 2 and layers < stages:
        bounds = [0, *(layers * stage // (stages - 2) for stage in range(stages - 1)), layers]
    return [range(begin, end) for begin, end in pairwise(bounds)]


def split_as_given(lengths: Sequence[int]) -> list[range]:
    """Return each stage's layers as consecutive ranges. lengths: layers per stage."""
    return [range(begin, end) for begin, end in pairwise(accumulate(lengths, initial=0))]


def split_layers(
    costs: Sequence[float], first_cost: float, last_cost: float, placement: Sequence[Sequence[int]]
) -> list[range]:
    """Return the layers of each stage as consecutive ranges. Only the first and the last stage may be empty.

    first_cost, last_cost: extra costs of these stages (embedding; head, loss and MTP modules)
    placement: stages of every rank
    """
    stages, layers = sum(map(len, placement)), len(costs)
    assert layers >= stages - 2, "check_schedule comes first"
    before = list(accumulate(costs, initial=0.0))

    def badness(bounds: list[int]) -> tuple:
        work = [before[end] - before[begin] for begin, end in pairwise(bounds)]
        work[0] += first_cost
        work[-1] += last_cost
        ranks = [sum(work[stage] for stage in own) for own in placement]
        squares = (sum(cost * cost for cost in part) for part in (ranks, work))
        # Rounding makes sums of the same costs in another order equal.
        return *(float(f"{figure:.9e}") for figure in (max(ranks), *squares)), sum(bounds)

    def allowed(bounds: list[int]) -> bool:
        return (
            all(begin < end for begin, end in pairwise(bounds[1:-1]))
            and bounds[0] <= bounds[1]
            and bounds[-2] <= layers
        )

    best = [0, *(one.stop for one in split_layers_evenly(layers, stages))]
    while True:
        moved = (_move(best, source, target) for source, target in permutations(range(stages), 2))
        found = min((bounds for bounds in moved if allowed(bounds)), key=badness, default=best)
        if badness(found) >= badness(best):
            return [range(begin, end) for begin, end in pairwise(best)]
        best = found


def _move(bounds: list[int], source: int, target: int) -> list[int]:
    """Move one layer between two stages. Stages between them keep their number of layers."""
    low, high, step = (source, target, -1) if source < target else (target, source, 1)
    return [bound + step if low < number <= high else bound for number, bound in enumerate(bounds)]
