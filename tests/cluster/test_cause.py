"""A loss that is not finite fails all ranks at once: the rank where it began is named, not the first one to say so."""

from cluster.cause import Failure, Kind, RankReport, name_cause
from conf.errors import EXIT_DIVERGED

SAID = "2 steps in a row had a non-finite loss"
NAMES = {rank: f"n{rank}" for rank in range(3)}


def diverged(began: list[int], first: int) -> list[RankReport]:
    """Reports of three ranks, of which `first` was the earliest by its clock."""
    times = {rank: 10.0 + (rank != first) for rank in NAMES}
    return [RankReport(rank, 3, Failure(rank, times[rank], "crash", SAID, EXIT_DIVERGED, began)) for rank in NAMES]


def test_the_rank_where_it_began_is_named():
    for first in NAMES:
        cause = name_cause(diverged([2], first), NAMES)
        assert (cause.kind, cause.ranks, cause.nodes, cause.code) == (Kind.diverged, (2,), ("n2",), EXIT_DIVERGED)
        assert cause.text == f"rank 2 on n2 failed: {SAID}"


def test_where_no_rank_is_to_blame_none_is_named():
    cause = name_cause(diverged([], 1), NAMES)
    assert cause.text == SAID and sorted(cause.ranks) == [0, 1, 2]
