"""The wall time of a run in parts that add up: by the events of a driver, or by starts and steps."""

import json

import pytest

from train.metrics.wall_time import split_wall_time
from train.show.report import write_report
from train.show.writer import _with_steps_again

EVENTS = [
    (1000, "launch", {"world": 4}),
    (1002, "attempt", {"pp": 1, "dp": 4, "nodes": ["a", "b"]}),
    (1010, "first_step", {}),
    (1060, "failure", {"seconds": 5}),
    (1062, "attempt", {"pp": 1, "dp": 2, "nodes": ["a"]}),
    (1070, "recovered", {"seconds": 10, "steps_again": 0}),
    (1070, "first_step", {}),
    (1100, "finish", {}),
]


def write_run(folder, events=(), starts=(), records=()):
    lines = [{"time": at, "kind": kind, "attempt": 1, "text": kind} | fields for at, kind, fields in events]
    if lines:
        (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    begun = [{"time": at, "command": "sluice", "folder": "/", "commit": None, "modified": False} for at in starts]
    (folder / "starts.json").write_text(json.dumps(begun))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def step(number, at, step_seconds=1.0, data=0.0, stall=0.0, **more):
    record = {
        "step": number,
        "step_seconds": step_seconds,
        "data_wait_seconds": data,
        "checkpoint_stall_seconds": stall,
    }
    return record | {"time": at} | more


def test_a_run_with_a_driver_has_the_parts_of_its_events_and_what_its_steps_waited_for(tmp_path):
    records = [
        step(1, 1010),
        step(2, 1012, 1.5, data=0.5),
        step(3, 1020, 2.0, stall=3.0),
        step(9, 1071),
        step(10, 1075, 4.0, data=1.0),
    ]
    write_run(tmp_path, EVENTS, [1000], records)
    found = split_wall_time(tmp_path)
    assert found.seconds == pytest.approx(100)
    assert found.seconds_in["data"] == pytest.approx(1.5) and found.seconds_in["stall"] == pytest.approx(3)
    assert found.seconds_in["beside"] == pytest.approx(0.5 + 3)
    assert found.seconds_in["detection"] == 5 and found.seconds_in["restart"] == 10 and found.seconds_in["start"] == 8
    assert found.seconds_in["training"] == pytest.approx(45 + 30 - 1.5 - 3 - 3.5)
    assert found.effective == pytest.approx((45 + 15) / 75 * found.seconds_in["training"] / 100)
    page = write_report(tmp_path).read_text()
    assert "Wall time by cause" in page and "waiting for checkpoints" in page and "1:40 in 2 starts" in page


def test_a_run_without_one_has_its_starts_and_the_steps_that_it_did_again(tmp_path):
    records = [step(1, 110), step(2, 112, 2.0), step(3, 1020, resumed={"step": 2, "again": 3, "until": 118}), step(4, 1024, 4.0),
               step(5, 1028, 4.0), step(6, 1033, 4.0)]  # fmt: skip
    write_run(tmp_path, starts=[100, 1000], records=records)
    found = split_wall_time(tmp_path)
    assert found.seconds == pytest.approx(18 + 33) and found.starts == 2
    assert found.seconds_in["start"] == 10 + 20 and found.seconds_in["again"] == 8
    assert found.seconds_in["beside"] == pytest.approx(1) and found.seconds_in["training"] == pytest.approx(8 + 5 - 1)
    assert split_wall_time(tmp_path, now=1040).seconds == pytest.approx(18 + 40)


def test_a_record_of_several_steps_counts_the_time_of_each(tmp_path):
    """As log.every has it: seconds of a step and of its data are means."""
    records = [step(10, 110), step(20, 130, 1.5, data=0.2, stall=1.0)]
    write_run(tmp_path, starts=[100], records=records)
    found = split_wall_time(tmp_path)
    assert found.seconds_in["data"] == pytest.approx(2) and found.seconds_in["stall"] == 1
    assert found.seconds_in["beside"] == pytest.approx(20 - 15 - 1)


def test_waits_are_no_longer_than_the_time_between_two_records(tmp_path):
    """A step that waited four of its ten seconds for data and says that it took one; and one that waited for more than there was."""
    records = [step(1, 110), step(2, 120, 1.0, data=4.0), step(3, 130, 1.0, data=6.0, stall=9.0)]
    write_run(tmp_path, starts=[100], records=records)
    found = split_wall_time(tmp_path)
    assert found.seconds_in["data"] == 4 + 6 and found.seconds_in["stall"] == 4 and found.seconds_in["beside"] == 6
    assert found.seconds_in["training"] == 0 and found.seconds == 30


def test_steps_that_are_said_to_reach_into_the_next_start_end_where_they_were_seen(tmp_path):
    """A clock that was set back: nothing counts twice."""
    records = [step(1, 110), step(2, 112), step(3, 1020, resumed={"step": 2, "again": 3, "until": 1500})]
    write_run(tmp_path, starts=[100, 1000], records=records)
    assert split_wall_time(tmp_path).seconds == pytest.approx(12 + 20)


def test_a_run_of_which_nothing_is_known_has_no_parts(tmp_path):
    assert split_wall_time(tmp_path) is None


def test_steps_behind_the_resumed_one_are_told_as_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert _with_steps_again(path, 0, None) is None
    write_run(tmp_path, records=[step(1, 10), step(7, 20)])
    assert _with_steps_again(path, 7, {"step": 7}) == {"step": 7}
    assert _with_steps_again(path, 5, {"step": 5}) == {"step": 5, "again": 2, "until": 20}
    assert _with_steps_again(path, 0, None) == {"step": 0, "from": "the beginning", "again": 7, "until": 20}
