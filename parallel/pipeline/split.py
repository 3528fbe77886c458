"""Which layers go to which pipeline stage, which stages to which rank, and what a schedule asks. Pure: no torch.

The rank with the most work sets the pace of the whole pipeline, whether its work lies in one stage or in two. So the split
starts from equal numbers of layers and, as long as that helps, moves one layer's worth from one stage to another, the
stages between passing theirs on. What helps, in this order: a smaller largest cost of a rank, evener costs of the ranks,
evener costs of the stages, fewer layers in early stages, which hold the activations of more micro-batches in flight.
With layers of equal cost no better split exists; with a few cheaper ones among them it is at most one of those off.

The first stage has the embedding and the last the head and the MTP modules, so these two may do without layers.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise, permutations

from conf.errors import UserError
from conf.pipeline_schedules import PLAIN_SCHEDULE, SCHEDULES


def check_schedule(name: str, pp: int, micro_batches: int, layers: int, virtual: int = 2) -> None:
    """Raise UserError when the schedule cannot run with these sizes. Pure; called before anything starts.

    micro_batches: micro-batches per step and data-parallel rank, batch_size / (micro_batch_size x dp).
    """
    schedule, plain = SCHEDULES[name], SCHEDULES[PLAIN_SCHEDULE]
    each = schedule.rank_stages(virtual)
    stages = pp * each
    if layers < stages - 2:
        able = [f"parallel.virtual_stages <= {(layers + 2) // pp}"] * (layers + 2 >= 2 * pp)
        if layers + 2 >= pp and each > 1 and not plain.find_broken_rule(pp, micro_batches):
            able += [f"parallel.schedule={PLAIN_SCHEDULE}" + " without parallel.virtual_stages" * (virtual != 2)]
        fewer = (layers + 2) // each
        able += [f"parallel.pp <= {fewer}"] * (fewer > 1 or (fewer == 1 and not able))  # 1 would be no pipeline
        raise UserError(
            "parallel.pp",
            f"{pp} with {_given(name, virtual)}",
            f"{name} makes {stages} stages, of which all but the first and the last need a layer, and model.layers={layers}",
            f"use {' or '.join([*able, f'model.layers >= {stages - 2}'])}",
        )
    if rule := schedule.find_broken_rule(pp, micro_batches):
        raise UserError(
            "batch_size",
            f"{micro_batches} micro-batches per step and data-parallel rank",
            rule,
            "change batch_size, micro_batch_size or parallel.dp (micro-batches = batch_size / (micro_batch_size x dp)), "
            "or choose another parallel.schedule",
        )


def _given(name: str, virtual: int) -> str:
    """A schedule as a command line has it."""
    return f"parallel.schedule={name}" + (f" parallel.virtual_stages={virtual}" if virtual != 2 else "")


def check_split(lengths: Sequence[int], name: str, pp: int, layers: int, virtual: int = 2) -> None:
    """Raise UserError when these are not layers of every stage of a pipeline. Pure; called before anything starts."""
    stages, given = pp * SCHEDULES[name].rank_stages(virtual), "[" + ",".join(map(str, lengths)) + "]"
    if len(lengths) != stages:
        raise UserError(
            "parallel.split",
            given,
            f"has {len(lengths)} stages, and parallel.pp={pp} with {_given(name, virtual)} makes {stages}",
            f"give {stages} numbers, or take parallel.split=cost",
        )
    if sum(lengths) != layers:
        raise UserError(
            "parallel.split",
            given,
            f"has {sum(lengths)} layers in all, and model.layers={layers}",
            f"{'add' if sum(lengths) < layers else 'take away'} {abs(layers - sum(lengths))}, or take parallel.split=cost",
        )
    if empty := [stage for stage in range(1, stages - 1) if lengths[stage] == 0]:
        raise UserError(
            "parallel.split",
            given,
            f"leaves stage {empty[0]} without a layer, which only the first and the last may be",
            "give it a layer of another stage, or take parallel.split=cost",
        )


def split_layers_evenly(layers: int, stages: int) -> list[range]:
    """Contiguous layers of every stage, as many for each as can be; with too few, the first and the last do without."""
    bounds = [layers * stage // stages for stage in range(stages + 1)]
    if stages > 2 and layers < stages:
        bounds = [0, *(layers * stage // (stages - 2) for stage in range(stages - 1)), layers]
    return [range(begin, end) for begin, end in pairwise(bounds)]


def split_as_given(lengths: Sequence[int]) -> list[range]:
    """Contiguous layers of every stage, so many each."""
    return [range(begin, end) for begin, end in pairwise(accumulate(lengths, initial=0))]


def split_layers(
    costs: Sequence[float], first_cost: float, last_cost: float, placement: Sequence[Sequence[int]]
) -> list[range]:
    """Contiguous layers of every stage: at least one each, but for the first and the last, which may have none.

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
        # Sums of the same costs in another order differ by rounding, and count as ties.
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
    """The stage `source` gives one layer away, `target` gets one, those between keep their number."""
    low, high, step = (source, target, -1) if source < target else (target, source, 1)
    return [bound + step if low < number <= high else bound for number, bound in enumerate(bounds)]
