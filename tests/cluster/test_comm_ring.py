"""The ring buffer of a rank: a reader gets what was written, also after a wrap or SIGKILL, and never half a record."""

import os
import signal
import struct
import subprocess
import sys
import time

import pytest

from cluster import comm_ring
from cluster.comm_ring import (
    RECORD,
    RECORDS_AT,
    CommRing,
    counted_in,
    got_on,
    pack_ring,
    read_trace,
    read_traces,
    wrote,
)
from cluster.incident import unpack_traces
from cluster.run_files import read_counts, ring_path


def fill(ring: CommRing, count: int, ends: bool = True) -> None:
    group = ring.name_group("7", "dp", range(0, 8, 2))
    for seq in range(1, count + 1):
        at = ring.begin(group, seq, "all_reduce", "bfloat16", seq, 2 * seq, -1, ring.place("a/b.py", 12))
        ring.wait(at)
        if ends:
            ring.end(at)


def test_what_was_written_is_read(tmp_path):
    ring = CommRing(ring_path(tmp_path, 3), 3, 8, records=16)
    ring.enter("schedule", 5)
    ring.act("FB", 2, 300)
    ring.layer = 4
    fill(ring, 2)
    strange = ring.name_group("8", "odd", (0, 3, 4))
    ring.begin(strange, 1, "send", "float8_e5m2", 9, 0, 4, 0)
    trace = read_traces(tmp_path)[3]
    assert (trace.rank, trace.world, trace.pid, trace.step, trace.phase, trace.action) == (
        3,
        8,
        os.getpid(),
        5,
        "schedule",
        "FB2.300",
    )
    assert trace.is_here
    first, second, message = trace.records
    assert (first.group.label, first.group.ranks, first.seq, first.kind, first.dtype) == (
        "dp",
        (0, 2, 4, 6),
        1,
        "all_reduce",
        "bfloat16",
    )
    assert (second.sent, second.received, second.place, second.layer, second.action) == (
        2,
        4,
        "a/b.py:12",
        4,
        "FB2.300",
    )
    assert 0 < first.began <= first.waited <= first.ended and not first.blocks
    assert (message.group.ranks, message.peer, message.dtype, message.place, message.ended) == (
        (0, 3, 4),
        4,
        "other",
        "",
        0.0,
    )


def test_it_wraps_and_keeps_the_newest(tmp_path):
    ring = CommRing(ring_path(tmp_path, 0), 0, 1, records=16)
    fill(ring, 50)
    records = read_traces(tmp_path)[0].records
    assert [record.seq for record in records] == list(range(35, 51))
    packed = unpack_traces({0: pack_ring(ring_path(tmp_path, 0), 1)})
    assert packed[0].records == records


def test_a_run_of_many_ranks_sends_fewer_records(tmp_path):
    fill(CommRing(ring_path(tmp_path, 0), 0, 1), 3000)
    assert len(unpack_traces({0: pack_ring(ring_path(tmp_path, 0), 1 << 20)})[0].records) == comm_ring.LEAST_SENT
    assert unpack_traces({0: b"no ring", 1: pack_ring(ring_path(tmp_path, 0), 1)}).keys() == {1}


def test_half_a_record_is_left_out(tmp_path):
    ring = CommRing(ring_path(tmp_path, 0), 0, 1, records=16)
    fill(ring, 20)
    raw = bytearray(ring_path(tmp_path, 0).read_bytes())
    struct.pack_into("<Q", raw, RECORDS_AT + 2 * RECORD.size, 35)  # its new number is there, its end is not
    assert [record.seq for record in read_trace(bytes(raw)).records] == [seq for seq in range(5, 21) if seq != 19]
    assert not read_trace(bytes(raw[:RECORDS_AT])).records


@pytest.mark.parametrize("raw", [b"", b"x" * RECORDS_AT])
def test_what_is_no_ring_is_refused(raw, tmp_path):
    with pytest.raises(ValueError, match="no ring"):
        read_trace(raw)
    ring_path(tmp_path, 0).write_bytes(raw)
    assert read_traces(tmp_path) == {}


def test_a_full_table_costs_names_and_no_record(tmp_path):
    ring = CommRing(ring_path(tmp_path, 0), 0, 1, records=16)
    for line in range(5000):
        ring.place("some/long/path/of/a/file.py", line)
    fill(ring, 1)
    assert read_traces(tmp_path)[0].records[-1].group.label == "?"


WRITER = """
import sys
import time
from pathlib import Path
from tests.cluster.test_comm_ring import fill
from cluster.comm_ring import CommRing
from cluster.run_files import ring_path
ring = CommRing(ring_path(Path(sys.argv[1]), 1), 1, 2)
fill(ring, 3, ends=False)
print("written", flush=True)
sys.stdin.read()
"""


def test_it_outlives_a_rank_that_is_killed(tmp_path):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert writer.stdout.readline() == b"written\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    trace = read_traces(tmp_path)[1]
    assert trace.pid == writer.pid and [record.seq for record in trace.blocked] == [1, 2, 3]


def test_rings_of_a_larger_start_before_are_not_read(tmp_path):
    CommRing(ring_path(tmp_path, 5), 5, 8, records=16)
    for rank in range(2):
        CommRing(ring_path(tmp_path, rank), rank, 2, records=16)
    assert read_traces(tmp_path).keys() == {0, 1}


def test_the_newest_records_are_read_of_rings_since_a_start(tmp_path):
    ring = CommRing(ring_path(tmp_path, 0), 0, 2, records=16)
    fill(ring, 6)
    raw = ring_path(tmp_path, 0).read_bytes()
    assert [record.seq for record in read_trace(raw, last=2).records] == [5, 6]
    started = read_trace(raw).started
    assert read_traces(tmp_path, since=started).keys() == {0} and not read_traces(tmp_path, since=started + 1e-3)


def test_a_rank_waits_for_what_it_has_begun_to_wait_for_and_no_more(tmp_path):
    ring = CommRing(ring_path(tmp_path, 0), 0, 2, records=16)
    group = ring.name_group("7", "dp", (0, 1))
    for seq in (1, 2, 3):
        at = ring.begin(group, seq, "all_reduce", "float32", 1, 1, -1, 0)
        if seq > 1:
            ring.wait(at)
        if seq == 2:
            ring.end(at)
    assert [record.seq for record in read_traces(tmp_path)[0].blocked] == [3]


def test_groups_of_any_three_ranks_are_those_ranks(tmp_path):
    """Also where they could be taken for a beginning, an end and a stride."""
    ring = CommRing(ring_path(tmp_path, 0), 0, 9, records=16)
    groups = [(0, 2, 1), (5, 3), (1, 2, 3), (0, 4, 8), (8, 3, 1), (6,), (0, 1), (3, 5, 6)]
    for number, ranks in enumerate(groups):
        ring.begin(ring.name_group(str(number), "odd", ranks), 1, "broadcast", "float32", 1, 1, -1, 0)
    assert [record.group.ranks for record in read_traces(tmp_path)[0].records] == groups


def test_what_a_rank_got_done_is_counted_in_its_ring_and_nowhere_else(tmp_path):
    got_on()
    assert read_counts(tmp_path, 0) == (0, 0), "no ring"
    ring = CommRing(ring_path(tmp_path, 0), 0, 1)
    before, _ = read_counts(tmp_path, 0)
    with counted_in(ring):
        got_on()
        wrote(5)
        wrote(7)
        ring.enter("validation", 3)
        ring.begin(ring.name_group("0", "dp", range(1)), 1, "barrier", "", 0, 0, -1, 0)
    got_on()
    assert read_counts(tmp_path, 0) == (before + 3, 12)
    trace = read_trace(ring_path(tmp_path, 0).read_bytes())
    assert (trace.step, trace.phase, len(trace.records)) == (3, "validation", 1)
    (tmp_path / "rank_1.ring").symlink_to(ring_path(tmp_path, 0))
    assert read_counts(tmp_path, 1) == (0, 0), "of another file"


def test_a_clock_that_is_set_in_the_middle_of_a_run_changes_no_time_of_what_a_rank_did(tmp_path, monkeypatch):
    ring, now = CommRing(ring_path(tmp_path, 0), 0, 1), time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600)
    ring.enter("data", 3)
    fill(ring, 1)
    trace = read_traces(tmp_path)[0]
    times = trace.since, trace.records[0].began, trace.records[0].waited, trace.records[0].ended
    assert all(abs(said - now()) < 60 for said in times)
