"""Finds the blocking rank from ring buffers that the tests write: every way in which ranks can differ, and cases
without an answer."""

import itertools

import pytest

from cluster.cause import Cause, Kind, RankReport
from cluster.comm_ring import CommGroup, CommRecord, RankTrace
from cluster.compare_ranks import compare_ranks
from cluster.incident import describe_incident, incident_screen, judge_failure, judge_hang
from cluster.judgement import Fault
from cluster.rank_differences import find_difference

ALL4 = CommGroup("0", "all ranks", (0, 1, 2, 3))
PAIR = CommGroup("1", "dp", (0, 1))
OTHER_PAIR = CommGroup("2", "dp", (2, 3))
CROSS = CommGroup("3", "pp", (0, 1))
STEP = (("all_reduce", 100), ("all_gather", 7), ("all_to_all", 0), ("all_reduce", 1))
"""What a rank does in a step in its group: kind and elements."""


class Rank:
    """Writes what a rank does."""

    clock = itertools.count(1)

    def __init__(self, rank: int, world: int = 2):
        self.trace = RankTrace(rank, world, 1, "here", 0.0)
        self.trace.records.append(self._record(CommGroup("start", "start", tuple(range(world))), "barrier", 0, "", 1))
        self._seqs: dict[tuple, int] = {}

    def _record(self, group, kind, size, dtype, seq, peer=-1, place="", waits=False) -> CommRecord:
        now = float(next(self.clock))
        sent, received = (0, size) if kind == "receive" else (size, 0) if kind == "send" else (size, size)
        return CommRecord(
            group, seq, kind, dtype, sent, received, peer, self.trace.step, "schedule", -1, "", place or f"code.py:{kind}", now,
            now if waits else 0.0, 0.0 if waits else now,
        )  # fmt: skip

    def do(self, group, kind, size, dtype="float32", peer=-1, place="", waits=False) -> "Rank":
        key = (group.name, kind, peer) if peer >= 0 else (group.name,)
        self._seqs[key] = self._seqs.get(key, 0) + 1
        self.trace.records.append(self._record(group, kind, size, dtype, self._seqs[key], peer, place, waits))
        return self

    def step(self, group=PAIR, what=STEP) -> "Rank":
        self.trace.step += 1
        for place, (kind, size) in enumerate(what):
            self.do(group, kind, size, place=f"code.py:{place}")
        return self

    def begin_step(self, group=PAIR, what=(), waits=False) -> "Rank":
        """Part of a step, in the last of which it waits."""
        self.trace.step += 1
        for number, (place, kind, size, *dtype) in enumerate(what, 1):
            self.do(group, kind, size, *dtype, place=f"code.py:{place}", waits=waits and number == len(what))
        return self


def pair(mine, theirs, group=PAIR) -> dict[int, RankTrace]:
    """Ranks 0 and 1 after two steps and parts of a third; rank 1 does `theirs`."""
    ranks = Rank(0), Rank(1)
    for rank, what in zip(ranks, (mine, theirs), strict=True):
        rank.step(group).step(group).begin_step(group, what, waits=True)
    return {rank.trace.rank: rank.trace for rank in ranks}


RIGHT = [(0, "all_reduce", 100), (1, "all_gather", 7), (2, "all_to_all", 0)]


@pytest.mark.parametrize(
    ("theirs", "fault"),
    [
        (RIGHT[1:2], Fault.skipped),
        ([(3, "all_reduce", 1)], Fault.skipped),
        ([RIGHT[0], RIGHT[2]], Fault.skipped),
        ([RIGHT[0], RIGHT[0]], Fault.repeated),
        ([RIGHT[1], RIGHT[0]], Fault.reordered),
        ([(0, "all_reduce", 200)], Fault.resized),
        ([(0, "all_reduce", 100, "int64")], Fault.retyped),
        ([(9, "broadcast", 3)], Fault.other),
    ],
)
def test_the_one_of_two_ranks_that_does_not_do_what_it_did_before_is_named(theirs, fault):
    found = compare_ranks(pair(RIGHT, theirs), {})
    assert (found.fault, found.ranks) == (fault, (1,))
    assert "dp [0, 1]" in found.text
    mirrored = compare_ranks(pair(theirs, RIGHT), {})
    assert (mirrored.fault, mirrored.ranks) == (fault, (0,))


def test_a_skipped_collective_is_named_with_its_line():
    found = compare_ranks(pair(RIGHT, [RIGHT[0], RIGHT[2]]), {})
    assert found.where == "code.py:1" and "all_gather" in found.text


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("periods", [1, 3])
def test_a_collective_of_every_third_step_that_one_rank_leaves_out_is_its_fault_and_not_that_of_the_others(
    world, periods
):
    """Of two ranks one is named where the period is known, and none where it is not."""
    group = CommGroup("0", "all ranks", tuple(range(world)))
    extra = (*STEP[:1], ("all_gather", 9), *STEP[1:])
    ranks = [Rank(number, world) for number in range(world)]
    for rank in ranks:
        rank.step(group, (*STEP, ("barrier", 0)))  # the first steps of a run have more
        for step in range(3 * periods + 2):
            rank.step(group, extra if step % 3 == 2 else STEP)
        left_out = rank.trace.rank == 1
        what = [(0, *STEP[0]), (1, *STEP[1])] if left_out else [(0, *extra[0]), (1, *extra[1])]
        rank.begin_step(group, what, waits=True)
    found = compare_ranks({rank.trace.rank: rank.trace for rank in ranks}, {})
    if world == 2 and periods == 1:
        assert (found.fault, found.ranks, found.among) == (Fault.unknown, (), (0, 1))
    else:
        assert (found.fault, found.ranks) == (Fault.skipped, (1,)), found.text


def test_in_the_first_step_most_of_a_group_are_believed_and_of_two_none():
    ranks = [
        Rank(number, 4).begin_step(ALL4, [(0, "all_reduce", 100 if number != 2 else 50)], waits=True)
        for number in range(4)
    ]
    found = compare_ranks({rank.trace.rank: rank.trace for rank in ranks}, {})
    assert (found.fault, found.ranks) == (Fault.resized, (2,))
    two = [Rank(number).begin_step(PAIR, [(0, "all_reduce", 100 + number)], waits=True) for number in range(2)]
    found = compare_ranks({rank.trace.rank: rank.trace for rank in two}, {})
    assert (found.fault, found.ranks, found.among) == (Fault.unknown, (), (0, 1))


def test_of_two_ranks_in_the_first_step_the_groups_that_do_the_same_elsewhere_decide():
    ranks = [
        Rank(number, 4).begin_step(PAIR if number < 2 else OTHER_PAIR, [(0, "all_reduce", 50 if number == 1 else 100)])
        for number in range(4)
    ]
    found = find_difference({rank.trace.rank: rank.trace for rank in ranks})
    assert found is not None and (found.fault, found.ranks) == (Fault.resized, (1,))


def test_exchanges_may_differ_in_size_but_not_in_their_sum():
    def exchange(sent: int, received: int) -> tuple[dict, Rank]:
        ranks = [Rank(number).step().step() for number in range(2)]
        for rank, (out, back) in zip(ranks, ((5, received), (sent, 5)), strict=True):
            rank.trace.step += 1
            rank.do(PAIR, "all_to_all", out)
            rank.trace.records[-1] = rank.trace.records[-1]._replace(received=back)
        return {rank.trace.rank: rank.trace for rank in ranks}, ranks[0]

    assert find_difference(exchange(9, 9)[0]) is None
    found = find_difference(exchange(9, 8)[0])
    assert found is not None and found.fault is Fault.unknown and found.among == (0, 1)


def test_a_rank_for_which_others_wait_through_others_is_named():
    """Ranks 0 and 1 wait for each other's stage: 2 waits for 1, 1 for 0, 0 is elsewhere."""
    ranks = [Rank(number, 4) for number in range(4)]
    for rank in ranks:
        rank.step(ALL4)
    ranks[2].do(CommGroup("5", "pp", (1, 2)), "receive", 8, peer=1, waits=True)
    ranks[1].do(PAIR, "all_reduce", 3, waits=True)
    ranks[3].do(ALL4, "all_reduce", 3, waits=True)
    stack = 'Thread 0x1 (most recent call first):\n  File "/x/threading.py", line 1 in wait\n  File "/x/own.py", line 7 in load\n'
    found = compare_ranks({rank.trace.rank: rank.trace for rank in ranks}, {0: stack})
    assert (found.fault, found.ranks) == (Fault.lock, (0,))
    assert found.where == "/x/own.py:7 in load"
    assert [(wait.rank, wait.missing) for wait in found.waits] == [(2, (1,)), (1, (0,)), (3, (0, 1, 2))]


def test_phase_data_means_the_loader():
    traces = pair(RIGHT, [])
    traces[1].phase = "data"
    found = compare_ranks(traces, {})
    assert (found.fault, found.ranks) == (Fault.loader, (1,))


def test_two_ranks_that_do_not_come_are_both_named_beside_a_stopped_one():
    ranks = [Rank(number, 4).step(ALL4) for number in range(4)]
    for rank in ranks[:1]:
        rank.begin_step(ALL4, RIGHT[:1], waits=True)
    traces = {rank.trace.rank: rank.trace for rank in ranks}
    assert compare_ranks(traces, {}).ranks == (1, 2, 3)
    found = compare_ranks(traces, {}, stopped=[2])
    assert found.fault is Fault.stopped and found.ranks == (2, 1, 3)


def test_a_send_without_its_receive_and_the_other_way_round():
    for left_out, fault in (("send", Fault.skipped), ("receive", Fault.skipped)):
        sender, receiver = Rank(0), Rank(1)
        for step in range(3):
            for rank in (sender, receiver):
                rank.trace.step += 1
            last = step == 2
            if not (last and left_out == "send"):
                sender.do(CROSS, "send", 8, peer=1)
            sender.do(CROSS, "receive", 8, peer=1, waits=last, place="code.py:back")
            if not (last and left_out == "receive"):
                receiver.do(CROSS, "receive", 8, peer=0, waits=last and left_out == "send")
            if not (last and left_out == "send"):
                receiver.do(
                    PAIR if last else CROSS, "all_reduce" if last else "send", 8, peer=-1 if last else 0, waits=last
                )
        found = compare_ranks({0: sender.trace, 1: receiver.trace}, {})
        wrong = 0 if left_out == "send" else 1
        assert found.fault in (fault, Fault.other) and found.ranks == (wrong,), found


def test_a_message_of_half_its_size_is_the_senders():
    sender, receiver = Rank(0), Rank(1)
    for size in (8, 8, 4):
        for rank in (sender, receiver):
            rank.trace.step += 1
        sender.do(CROSS, "send", size, peer=1)
        receiver.do(CROSS, "receive", 8, peer=0, waits=size == 4)
    found = compare_ranks({0: sender.trace, 1: receiver.trace}, {})
    assert (found.fault, found.ranks) == (Fault.resized, (0,))


@pytest.mark.parametrize(
    ("sent", "received", "fault", "ranks", "among"),
    [
        ((8, "int64"), (8, "float32"), Fault.retyped, (0,), ()),
        ((8, "float32"), (8, "int64"), Fault.retyped, (1,), ()),
        ((4, "float32"), (6, "float32"), Fault.unknown, (), (0, 1)),
    ],
)
def test_the_end_of_a_message_that_changed_is_named_and_of_two_none(sent, received, fault, ranks, among):
    sender, receiver = Rank(0), Rank(1)
    for ends in ([(8, "float32")] * 2, [(8, "float32")] * 2, (sent, received)):
        for rank in (sender, receiver):
            rank.trace.step += 1
        sender.do(CROSS, "send", *ends[0], peer=1)
        receiver.do(CROSS, "receive", *ends[1], peer=0, waits=ends[1] is received)
    found = compare_ranks({0: sender.trace, 1: receiver.trace}, {})
    assert (found.fault, found.ranks, tuple(found.among)) == (fault, ranks, among)


def test_two_groups_in_another_order_on_one_rank():
    ranks = Rank(0), Rank(1)
    for rank in ranks:
        for _ in range(2):
            rank.trace.step += 1
            rank.do(PAIR, "all_reduce", 5).do(CROSS, "all_reduce", 6)
        rank.trace.step += 1
    ranks[0].do(PAIR, "all_reduce", 5, waits=True)
    ranks[1].do(CROSS, "all_reduce", 6, waits=True)
    found = compare_ranks({rank.trace.rank: rank.trace for rank in ranks}, {})
    assert found.ranks == (1,) and found.fault in (Fault.reordered, Fault.skipped)
    strangers = Rank(0).do(PAIR, "all_reduce", 5, waits=True), Rank(1).do(CROSS, "all_reduce", 6, waits=True)
    found = compare_ranks({rank.trace.rank: rank.trace for rank in strangers}, {})
    assert (found.fault, found.ranks, found.among) == (Fault.unknown, (), (0, 1)), "never a guess"


def test_all_in_and_none_out_is_a_network_and_nobody_is_named():
    found = compare_ranks(pair(RIGHT, RIGHT), {})
    assert (found.fault, found.ranks, found.among) == (Fault.stuck, (), (0, 1))


@pytest.mark.parametrize(
    ("late", "ranks", "among"),
    [
        ({1: [3], 2: [3], 3: [4]}, (2,), ()),
        ({1: [3], 3: [2]}, (2,), ()),
        ({1: [3]}, (), (0, 2)),
        ({1: [2], 3: [4]}, (), (0, 1, 2, 3)),
        ({}, (), (0, 1, 2, 3)),
    ],
)
def test_the_host_that_all_unanswered_messages_have_in_common_is_named(late, ranks, among):
    """late: of hosts, from 1, those that do not answer them."""
    traces = {rank: Rank(rank, 4).begin_step(ALL4, [(0, "all_reduce", 5)], waits=True).trace for rank in range(4)}
    said = {rank: ", ".join(f"10.0.0.{other}" for other in late.get(rank + 1, ())) for rank in range(4)}
    stacks = {rank: f"Sent from 10.0.0.{rank + 1} and not acknowledged by: {said[rank]}\n" for rank in range(4)}
    found = compare_ranks(traces, stacks)
    assert (found.fault, found.ranks, found.among) == (Fault.link if late else Fault.stuck, ranks, among)
    assert len(found.waits) == 4


def test_a_ring_that_lost_the_step_before_gives_no_history():
    traces = pair(RIGHT, [RIGHT[1]])
    for trace in traces.values():
        trace.records = [record for record in trace.records if record.step >= 2]
    assert compare_ranks(traces, {}).fault is Fault.unknown


def test_a_crash_in_a_collective_is_blamed_on_who_did_another_one():
    traces = pair([*RIGHT[:1]], [(0, "all_reduce", 200)])
    died = Cause(Kind.crash, "rank 0 failed: RuntimeError: gloo", (0,))
    cause, finding = judge_failure(died, traces, {}, {0: "a", 1: "b"})
    assert cause.ranks == (1,) and cause.nodes == ("b",) and "consequence: rank 0 failed" in cause.text
    screen = incident_screen(describe_incident(cause, finding, traces, {}))
    assert (
        screen.startswith("culprit: rank 1\n") and "result:  rank 0 failed" in screen and len(screen.splitlines()) < 24
    )
    own = Cause(Kind.crash, "rank 0 failed: ValueError", (0,))
    assert judge_failure(own, pair(RIGHT[:1], RIGHT[:1]), {}, {})[0] is own, (
        "where nothing differs the rank is believed"
    )
    killed = Cause(Kind.killed, "rank 0 ended by signal SIGKILL", (0,))
    assert judge_failure(killed, traces, {}, {})[0] is killed


def test_a_hang_names_nodes_and_falls_back_on_stacks_without_rings():
    reports = [RankReport(rank, step=3) for rank in range(2)]
    cause, _ = judge_hang(reports, pair(RIGHT, []), {}, {0: "a", 1: "b"}, 12.0)
    assert (
        cause.ranks == (1,) and cause.nodes == ("b",) and cause.text.startswith("no step finished for 12 s (step 3): ")
    )
    reports[1].state = "T"
    cause, finding = judge_hang(reports, {}, {}, {}, 12.0)
    assert cause.ranks == finding.ranks == (1,) and finding.fault is Fault.stopped
