"""What ranks record when they fail, and which rank is named as the cause."""

import signal

import pytest

from cluster.cause import (
    LAST_WORDS_BYTES,
    NCCL_TIMEOUT,
    Failure,
    Kind,
    RankReport,
    begin_work,
    name_cause,
    name_hang,
    read_report,
    waits_for_ranks,
)
from cluster.driver.diagnosis import give_up
from cluster.incident import describe_incident, incident_screen, judge_failure
from cluster.run_files import at_work_path
from conf.errors import EXIT_CRASH, EXIT_DIVERGED, EXIT_STOPPED
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
    message = "checkpoint = there\n  rule: \N{SNOWMAN} is not written\n  cure: free space on this disk"
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


@pytest.mark.parametrize(
    ("code", "how", "cure"),
    [
        (-signal.SIGKILL, "signal SIGKILL (out of memory?)", "out-of-memory kills"),
        (-signal.SIGBUS, "signal SIGBUS", "/dev/shm"),
        (-signal.SIGILL, "signal SIGILL", "processor lacks"),
        (-signal.SIGSEGV, "signal SIGSEGV", "native code"),
        (-signal.SIGTERM, "signal SIGTERM", "find the sender of the signal"),
        (-40, "signal 40", "find the sender of the signal"),
        (0, "exit code 0 before the end of its work", "os._exit"),
        (7, "exit code 7 before the end of its work", "os._exit"),
        (EXIT_STOPPED, "exit code 75 before the end of its work", "os._exit"),
    ],
)
def test_each_end_without_a_word_has_its_own_cure(code, how, cure):
    lost = Failure(0, 1.0, "crash", "Connection closed by peer", EXIT_CRASH)
    cause = name_cause([RankReport(0, EXIT_CRASH, lost), RankReport(1, code, deserted=code >= 0)], {})
    assert (cause.kind, cause.ranks, cause.text) == (Kind.killed, (1,), f"rank 1 ended by {how}")
    cause, finding = judge_failure(cause, {}, {}, {})
    screen = incident_screen(describe_incident(cause, finding, {}, {}))
    told = give_up(cause, 1, 0, [], -1)
    assert cure in screen and cure in told
    assert ("memory" in told) == (code in (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS))


def aborted(rank: int, tail: str = "") -> RankReport:
    return RankReport(rank, -signal.SIGABRT, log_tail=tail)


def test_ranks_that_nccl_aborts_wait_for_the_one_that_is_silent():
    """One of them is enough to say why; without such a word an abort is an end like any other."""
    late = [aborted(0, f"...\n{NCCL_TIMEOUT}: ..."), aborted(1)]
    cause = name_cause([*late, RankReport(2)], NAMES)
    assert (cause.kind, cause.ranks) == (Kind.hang, (2,))
    assert cause.text == "rank 2 on n2 hangs: no answer while the others waited in a collective"
    both = name_cause(late, NAMES)
    assert (both.kind, both.ranks, both.log) == (Kind.hang, (0, 1), "")
    assert both.text.endswith("waited longer than cluster.timeout in a collective")
    plain = name_cause([aborted(0), aborted(1), RankReport(2)], NAMES)
    assert (plain.kind, plain.ranks) == (Kind.killed, (0, 1))


def test_of_ranks_that_ended_without_a_word_those_that_are_no_victims_are_named():
    segfault, lost_peer = RankReport(1, -signal.SIGSEGV), aborted(0)
    assert name_cause([lost_peer, segfault], NAMES).ranks == (1,)
    assert name_cause([lost_peer], NAMES).ranks == (0,)
    gone, killed_beside_it = RankReport(2, 0, deserted=True), RankReport(0, -signal.SIGTERM, deserted=True)
    assert gone.certain and not killed_beside_it.certain
    assert name_cause([killed_beside_it, gone], NAMES).ranks == (2,)


def test_a_rank_that_is_silent_while_another_timed_out_hangs():
    timed_out = RankReport(0, 1, Failure(0, 10.0, "timeout", "Timed out waiting 60 s", EXIT_CRASH))
    cause = name_cause([timed_out, RankReport(1)], NAMES)
    assert (cause.kind, cause.ranks) == (Kind.hang, (1,))
    crashed = RankReport(0, 1, Failure(0, 10.0, "crash", "it broke", EXIT_CRASH))
    assert name_cause([crashed, RankReport(1)], NAMES).kind is Kind.crash


FRAME = '  File "{}", line 1 in {}'
DIST, THREADS = "/x/lib/python3.11/site-packages/torch/distributed.py", "/usr/lib/python3.11/threading.py"


def stack_of(*frames: tuple[str, str], current: bool = True) -> str:
    """As faulthandler prints it: another thread first, the main thread last, the innermost frame on top."""
    head = "Current thread" if current else "Thread"
    main = "\n".join(FRAME.format(*frame) for frame in frames)
    return f"Thread 0x1 (most recent call first):\n{FRAME.format(DIST, 'all_reduce')}\n\n{head} 0x2 (most recent call first):\n{main}\n"


def test_who_waits_for_others_is_seen_in_the_innermost_frames_of_the_main_thread():
    own = ("/x/train/step.py", "run")
    for current in (True, False):
        assert waits_for_ranks(stack_of((DIST, "all_reduce"), own, current=current))
        assert not waits_for_ranks(stack_of(own, own, current=current)), "another thread waits"
    assert waits_for_ranks(stack_of((DIST, "work"), (DIST, "_wait_for"), own)), "a helper of torch lies on top"
    assert not waits_for_ranks(stack_of((THREADS, "wait"), own)), "a lock of Python is no other rank"
    assert not waits_for_ranks(stack_of(*[own] * 4, (DIST, "all_reduce")))


def test_of_ranks_that_hang_those_are_named_that_differ_from_the_others():
    reports = [RankReport(rank, step=7, phase="step") for rank in NAMES]
    waiting = stack_of((DIST, "all_reduce"), ("/x/train/step.py", "run"))
    busy = stack_of(("/x/train/data.py", "read"))
    everyone = dict.fromkeys(NAMES, waiting)
    assert name_hang(reports, everyone, NAMES, 60.0).ranks == (0, 1, 2)
    assert name_hang(reports, dict.fromkeys(NAMES, busy), NAMES, 60.0).text.endswith(
        "wait for each other, at " + FRAME.format("/x/train/data.py", "read").strip()
    )
    found = name_hang(reports, everyone | {1: busy}, NAMES, 60.0)
    assert found.ranks == (1,) and "is not in a collective" in found.text
    found = name_hang(reports, {0: waiting, 1: busy}, NAMES, 60.0)
    assert found.ranks == (2,) and "does not return a stack" in found.text
    reports[0].state = "T"
    found = name_hang(reports, {0: waiting, 1: busy}, NAMES, 60.0)
    assert found.ranks == (0,) and "no step finished for 60 s (step 7): rank 0 on n0 is stopped" in found.text
