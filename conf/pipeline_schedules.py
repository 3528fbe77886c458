"""The schedules of a pipeline: what each asks of a layout, and what follows from it. No torch.

Whoever wants to know something of a schedule asks it here and never compares its name. The order of its actions stands in the table of
parallel/pipeline/orders.py; an entry there and one here add a schedule.
"""

from collections.abc import Callable
from dataclasses import dataclass


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
