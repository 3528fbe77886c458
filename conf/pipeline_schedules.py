"""The schedules of a pipeline: what each asks of a layout, and what follows from it. No torch.

Whoever wants to know something of a schedule asks it here and never compares its name. The order of its actions stands in the table of
parallel/pipeline/orders.py; an entry there and one here add a schedule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from conf.errors import UserError


@dataclass(frozen=True)
class ActionSeconds:
    """How long the actions of one stage take, where all stages are equal."""

    forward: float
    inputs: float
    """The backward of inputs, I."""
    weights: float
    """The backward of weights, W; a whole backward is B = I + W."""
    pair: float
    """A forward and a backward that run together, FB."""


@dataclass(frozen=True)
class ScheduleFacts:
    """What is known of a schedule."""

    name: str
    idle_per_hop: Callable[[ActionSeconds], float]
    """Idle seconds of a rank in one step over pp - 1; stages equal, transfers free, micro-batches enough."""
    stages: int | None = 1
    """Stages of every rank; None: as many as parallel.virtual_stages says."""
    folds: bool = False
    """The stages lie in a V, so that the first and the last share rank 0, with the embedding and the head, which are tied for free
    there; else rank r has r, r + pp, r + 2 pp and so on."""
    least: int = 0
    """Micro-batches that it needs, over the ranks of the pipeline."""
    rounds: bool = False
    """Micro-batches come in rounds of about pp."""
    splits: bool = False
    """A backward is cut in two, I and W; else a rank begins when the stages before its first have gone forward, and ends before those
    go backward."""
    pairs: bool = False
    """The forward of one micro-batch and the backward of another run together, where parallel.overlap is true."""
    in_parts: str | None = None
    """The schedule of the same order that gives every rank several stages."""

    def rank_stages(self, virtual: int = 2) -> int:
        """Stages that each rank holds. virtual: parallel.virtual_stages."""
        return virtual if self.stages is None else self.stages

    def place_stages(self, pp: int, virtual: int = 2) -> list[list[int]]:
        """Stage numbers of every pipeline rank, ascending. virtual: as in `rank_stages`."""
        if self.folds:
            return [[r, 2 * pp - 1 - r] for r in range(pp)]
        return [[*range(r, pp * self.rank_stages(virtual), pp)] for r in range(pp)]

    def find_broken_rule(self, pp: int, micro_batches: int) -> str | None:
        """Why a pipeline of pp ranks cannot run so many micro-batches per step and data-parallel rank; None if it can."""
        least, rounds = max(1, self.least * pp), max(1, micro_batches // pp)
        if micro_batches < least:
            return f"{self.name} needs at least {least} micro-batches to fill {pp} pipeline ranks"
        if self.rounds and micro_batches % rounds:
            return (
                f"{self.name} needs micro-batches that {rounds} rounds of about {pp} divide (a multiple of pp is safe)"
            )
        return None

    def count_idle_seconds(self, pp: int, seconds: ActionSeconds) -> float:
        """Idle seconds of a rank in one step, in closed form. Counted on torch's lists by parallel/pipeline/simulate.py, which has no such limits;
        the tests hold the two together."""
        return (pp - 1) * self.idle_per_hop(seconds)


def _forward_and_backward(seconds: ActionSeconds) -> float:
    """With v stages a rank one of them is 1 / v of what it is with one, and so is the idle time."""
    return seconds.forward + seconds.inputs + seconds.weights


def _inputs(seconds: ActionSeconds) -> float:
    """For F <= I <= 2 W. Never 0: the title's zero bubble lets ranks start a step before others have ended the last one, and here the
    optimizer lies between."""
    return seconds.inputs


def _pair(seconds: ActionSeconds) -> float:
    """For I <= F pp / (pp - 1), of the ranks before the last, which leaves one pair unoverlapped. Equal to the paper's
    (PP/2 - 1)(FB + B - 3 W), Table 2, where F = I."""
    return seconds.pair + seconds.forward - 2 * seconds.weights


PLAIN_SCHEDULE = "1f1b"
"""What a pipeline of one stage runs as, and a recipe that asks for nothing else."""

SCHEDULES: dict[str, ScheduleFacts] = {
    each.name: each
    for each in (
        ScheduleFacts(PLAIN_SCHEDULE, _forward_and_backward, least=1, in_parts="interleaved"),
        ScheduleFacts("interleaved", _forward_and_backward, stages=None, rounds=True, in_parts="interleaved"),
        ScheduleFacts("zbv", _inputs, stages=2, folds=True, splits=True),
        ScheduleFacts("dualpipev", _pair, stages=2, folds=True, least=2, splits=True, pairs=True),
    )
}


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
