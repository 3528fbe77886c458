"""The pipeline schedules: their needs and their costs. Imports no torch.

Other code reads the properties in SCHEDULES, and never compares names of schedules. A new schedule needs an entry
here, and its order of actions in parallel/pipeline/orders.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from conf.errors import UserError


@dataclass(frozen=True)
class ActionSeconds:
    """Seconds of the actions of one stage; all stages are equal."""

    forward: float
    """Seconds of F, a forward."""
    inputs: float
    """Seconds of I, the gradients of inputs in a backward."""
    weights: float
    """Seconds of W, the gradients of weights in a backward."""
    pair: float
    """Seconds of FB, an overlapped forward and backward of two micro-batches."""


@dataclass(frozen=True)
class ScheduleFacts:
    """Properties of a pipeline schedule."""

    name: str
    idle_per_hop: Callable[[ActionSeconds], float]
    """Returns a rank's idle seconds in a step, divided by pp - 1, for equal stages and instant transfers."""
    stages: int | None = 1
    """Number of stages of every rank. None: parallel.virtual_stages."""
    folds: bool = False
    """True: the stages form a V, and rank 0 has the first and the last stage. False: rank r has the stages r, r + pp, r
    + 2 pp and so on."""
    least: int = 0
    """Minimum number of micro-batches, divided by the number of pipeline ranks."""
    rounds: bool = False
    """Whether micro-batches run in rounds of about pp micro-batches. The number of rounds must divide the number of
    micro-batches."""
    splits: bool = False
    """Whether a backward is split into I (gradients of inputs) and W (gradients of weights)."""
    pairs: bool = False
    """Whether the schedule pairs a forward with another micro-batch's backward (parallel.overlap)."""
    in_parts: str | None = None
    """Schedule with the same order and more stages per rank, or None."""

    def rank_stages(self, virtual: int = 2) -> int:
        """Return the number of stages per rank. virtual: parallel.virtual_stages."""
        return virtual if self.stages is None else self.stages

    def place_stages(self, pp: int, virtual: int = 2) -> list[list[int]]:
        """Return the ascending stage indices of every pipeline rank. virtual: parallel.virtual_stages."""
        if self.folds:
            return [[r, 2 * pp - 1 - r] for r in range(pp)]
        return [[*range(r, pp * self.rank_stages(virtual), pp)] for r in range(pp)]

    def find_broken_rule(self, pp: int, micro_batches: int) -> str | None:
        """Return why pp ranks cannot run this number of micro-batches, or None."""
        least, rounds = max(1, self.least * pp), max(1, micro_batches // pp)
        if micro_batches < least:
            return f"{self.name} needs at least {least} micro-batches to fill {pp} pipeline ranks"
        if self.rounds and micro_batches % rounds:
            return f"{self.name} needs a number of micro-batches that is a multiple of its {rounds} rounds of about {pp} (a multiple of pp is safe)"
        return None

    def count_idle_seconds(self, pp: int, seconds: ActionSeconds) -> float:
        """Return a rank's idle seconds in one step. Tests compare it with parallel/pipeline/simulate.py."""
        return (pp - 1) * self.idle_per_hop(seconds)


def _forward_and_backward(seconds: ActionSeconds) -> float:
    """Return a rank's idle seconds / (pp - 1) in 1f1b and interleaved, for any number of stages per rank."""
    return seconds.forward + seconds.inputs + seconds.weights


def _inputs(seconds: ActionSeconds) -> float:
    """Return a rank's idle seconds / (pp - 1) in zbv, if F <= I <= 2 W; see `ActionSeconds`.

    In the zero-bubble paper, the idle time is 0: ranks start a step before others end the previous step. In Sluice,
    all ranks run the optimizer between two steps.
    """
    return seconds.inputs


def _pair(seconds: ActionSeconds) -> float:
    """Return a rank's idle seconds / (pp - 1) in dualpipev, if I <= F pp / (pp - 1); see `ActionSeconds`. The result is
    wrong for the last rank, which has one FB pair that does not overlap.

    If F = I, the result equals (PP/2 - 1)(FB + B - 3 W) of the paper's Table 2.
    """
    return seconds.pair + seconds.forward - 2 * seconds.weights


PLAIN_SCHEDULE = "1f1b"
"""The schedule without a pipeline, and the default of a recipe."""

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
    """Raise UserError if the schedule cannot run with these numbers of ranks, micro-batches and layers.
    micro_batches: number per step and data-parallel rank."""
    schedule, plain = SCHEDULES[name], SCHEDULES[PLAIN_SCHEDULE]
    each = schedule.rank_stages(virtual)
    stages = pp * each
    if layers < stages - 2:
        able = [f"parallel.virtual_stages <= {(layers + 2) // pp}"] * (layers + 2 >= 2 * pp)
        if layers + 2 >= pp and each > 1 and not plain.find_broken_rule(pp, micro_batches):
            able += [f"parallel.schedule={PLAIN_SCHEDULE}" + " without parallel.virtual_stages" * (virtual != 2)]
        fewer = (layers + 2) // each
        able += [f"parallel.pp <= {fewer}"] * (fewer > 1 or (fewer == 1 and not able))  # pp = 1 is not a pipeline
        raise UserError(
            "parallel.pp",
            f"{pp} with {_given(name, virtual)}",
            f"{name} has {stages} stages, each of which needs a layer except the first and the last, and model.layers={layers}",
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
    """Return a schedule as a user types it."""
    return f"parallel.schedule={name}" + (f" parallel.virtual_stages={virtual}" if virtual != 2 else "")


def check_split(lengths: Sequence[int], name: str, pp: int, layers: int, virtual: int = 2) -> None:
    """Raise UserError unless `lengths` has a valid number of layers per stage."""
    stages, given = pp * SCHEDULES[name].rank_stages(virtual), "[" + ",".join(map(str, lengths)) + "]"
    if len(lengths) != stages:
        raise UserError(
            "parallel.split",
            given,
            f"has {len(lengths)} stages, and parallel.pp={pp} with {_given(name, virtual)} has {stages}",
            f"give {stages} numbers, or use parallel.split=cost",
        )
    if sum(lengths) != layers:
        raise UserError(
            "parallel.split",
            given,
            f"has {sum(lengths)} layers in all, and model.layers={layers}",
            f"{'add' if sum(lengths) < layers else 'remove'} {abs(layers - sum(lengths))}, or use parallel.split=cost",
        )
    if empty := [stage for stage in range(1, stages - 1) if lengths[stage] == 0]:
        raise UserError(
            "parallel.split",
            given,
            f"leaves stage {empty[0]} without a layer; only the first and the last stage may have none",
            "give this stage a layer of another stage, or use parallel.split=cost",
        )
