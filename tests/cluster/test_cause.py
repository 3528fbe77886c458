"""What ranks leave when they fail, and whom it blames."""

from cluster.cause import LAST_WORDS_BYTES, Failure, Kind, RankReport, begin_work, name_cause, read_report
from cluster.run_files import at_work_path
from conf.errors import EXIT_CRASH, EXIT_DIVERGED
from tests.disks import fill, small_disk

SAID = "2 steps in a row had a non-finite loss"
NAMES = {rank: f"n{rank}" for rank in range(3)}


def diverged(began: list[int], first: int) -> list[RankReport]:
    """Reports of three ranks, of which `first` was the earliest by its clock."""
    times = {rank: 10.0 + (rank != first) for rank in NAMES}
    return [RankReport(rank, 3, Failure(rank, times[rank], "crash", SAID, EXIT_DIVERGED, began)) for rank in NAMES]


def test_of_a_loss_that_is_not_finite_the_rank_where_it_began_is_named():
    """It fails all ranks at once; the first one to say so is no more to blame than the others."""
    for first in NAMES:
        cause = name_cause(diverged([2], first), NAMES)
        assert (cause.kind, cause.ranks, cause.nodes, cause.code) == (Kind.diverged, (2,), ("n2",), EXIT_DIVERGED)
        assert cause.text == f"rank 2 on n2 failed: {SAID}"


def test_where_no_rank_is_to_blame_none_is_named():
    cause = name_cause(diverged([], 1), NAMES)
    assert cause.text == SAID and sorted(cause.ranks) == [0, 1, 2]


def test_a_rank_has_room_on_a_full_disk_to_say_why_it_failed(tmp_path):
    """Also more than fits there: then the end of it."""
    message = "checkpoint = there\n  rule: \N{SNOWMAN} is not written\n  cure: free space there"
    with small_disk(tmp_path / "disk", "1m") as logs:
        for rank in range(2):
            begin_work(logs, rank)
        fill(logs)
        for rank, more in enumerate(("", "\x1b" * 2 * LAST_WORDS_BYTES)):
            Failure(rank, 1.0, "crash", more + message, EXIT_CRASH, whole=more).write(logs)
        reports = [read_report(rank, EXIT_CRASH, logs) for rank in range(2)]
        assert name_cause(reports[:1], {}).text == f"rank 0 failed: {message}"
        assert reports[1].failure.message.endswith(message) and not reports[1].deserted
        assert not any(at_work_path(logs, rank).exists() for rank in range(2))


def test_a_rank_whose_part_of_a_checkpoint_does_not_come_is_named_and_not_rank_0_which_says_so():
    screen = "checkpoint = there\n  rule: no files from ranks 1\n  cure: see why its disk does not answer"
    cause = name_cause([RankReport(0, 1, Failure(0, 10.0, "crash", screen, EXIT_CRASH, [1])), RankReport(1)], NAMES)
    assert (cause.ranks, cause.nodes) == ((1,), ("n1",)) and cause.text == f"rank 1 on n1 failed: {screen}"
