"""Assigns layers to pipeline stages, and thereby to ranks. Does not import torch.

The rank with the most work sets the pace of the pipeline, whether it has one stage or two. The split starts from equal
numbers of layers. As long as this improves the split, it moves one layer from one stage to another, and each stage
between the two passes a layer on. The goals, in order, are a smaller maximum cost of a rank, more even costs of ranks,
more even costs of stages, and fewer layers in early stages, because early stages hold the activations of more
micro-batches in flight. If all layers have the same cost, the result is optimal. With a few cheaper layers, the maximum
cost exceeds the optimum by at most one cheap layer.

The first stage has the embedding, and the last has the head and the MTP modules, so these two may have no layers.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise, permutations


def split_layers_evenly(layers: int, stages: int) -> list[range]:
    """Return the contiguous layers of each stage. The numbers of layers are as equal as possible. With too few layers,
    the first and the last stage have none."""
    bounds = [layers * stage // stages for stage in range(stages + 1)]
    if stages > 2 and layers < stages:
        bounds = [0, *(layers * stage // (stages - 2) for stage in range(stages - 1)), layers]
    return [range(begin, end) for begin, end in pairwise(bounds)]


def split_as_given(lengths: Sequence[int]) -> list[range]:
    """Return contiguous layers per stage. lengths: number of layers of every stage."""
    return [range(begin, end) for begin, end in pairwise(accumulate(lengths, initial=0))]


def split_layers(
    costs: Sequence[float], first_cost: float, last_cost: float, placement: Sequence[Sequence[int]]
) -> list[range]:
    """Return the contiguous layers of each stage. Each stage has at least one layer, but the first and the last stage
    may have none.

    costs: cost of every layer, in any unit; first_cost: extra cost of the first stage (embedding); last_cost: extra
    cost of the last stage (head, loss and MTP modules), in the same unit. placement: stages of every rank.
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
        # Sums of the same costs in another order differ in the last digits. Rounding makes these sums equal.
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
    """Move one layer from stage `source` to stage `target`; the stages between keep their number of layers."""
    low, high, step = (source, target, -1) if source < target else (target, source, 1)
    return [bound + step if low < number <= high else bound for number, bound in enumerate(bounds)]
