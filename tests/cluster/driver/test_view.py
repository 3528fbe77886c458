"""What the driver displays, and the record that it writes."""

import io

import pytest
from rich.console import Console

from cluster.driver.journal import Journal, read_events
from cluster.driver.time_split import split_time
from cluster.driver.view import View, last_record, status
from tests.cluster.world import World


def test_the_status_names_step_machines_and_the_last_event(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(
        '{"step":6,"main_loss":5.0}\n{"step":7,"loss":6.0,"main_loss":4.25,"tokens_per_second":1234.5}\n{"step":8,"lo'
    )
    world = World(nodes=4)
    world.run(5)
    world.kill_rank(1)
    world.run(2)
    text = status("run", 20, last_record(metrics), world.supervisor, "failure: rank 1 died")
    assert text.splitlines() == [
        "run  step 7/20  loss 4.25  1234 tokens/s  pp 1 x dp 4",
        "running  4/4 nodes  attempt 2  1 failures  saved step 5  failure: rank 1 died",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_of_rank_0_and_notes_are_printed_whole(tmp_path, terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=60)
    world = World()
    with View("run", tmp_path / "metrics.jsonl", 20, console) as view:
        view.output(b"step 1\nst")
        view.note("failure", "rank 1 died")
        view.note("checkpoint", "step 5")
        view.output(b"ep 2 [not markup]\nno end")
        view.update(world.supervisor)
    said = console.file.getvalue()
    assert "step 1\n" in said and "step 2 [not markup]" in said and "no end" in said
    assert "failure: rank 1 died" in said
    assert ("running" in said) == terminal
    assert terminal or "checkpoint" not in said


def test_events_are_whole_lines_with_known_kinds(tmp_path):
    journal = Journal(tmp_path)
    journal.write("attempt", 1, "attempt 1", dp=2)
    journal.write("recovered", 2, "step 7", seconds=4.0, steps_again=1)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"torn')
    events = read_events(tmp_path)
    assert [event["kind"] for event in events] == ["attempt", "recovered"] and events[0]["dp"] == 2
    Journal(tmp_path).write("finish", 2, "all steps are complete", code=0)
    assert [event["kind"] for event in read_events(tmp_path)] == ["attempt", "recovered", "finish"]
    with pytest.raises(AssertionError):
        journal.write("nonsense", 1, "")


def test_goodput_counts_starts_failures_and_hangs_but_not_the_night_between_two_launches():
    events = [
        {"time": 0, "kind": "launch"},
        {"time": 2, "kind": "attempt", "nodes": ["a", "b"]},
        {"time": 10, "kind": "first_step"},  # 10 s down
        {"time": 50, "kind": "failure"},  # a hang that began 20 s before
        {"time": 51, "kind": "attempt", "nodes": ["a"]},
        {"time": 55, "kind": "first_step"},  # 5 s down
        {"time": 55, "kind": "recovered", "seconds": 25},  # and 20 more
        {"time": 70, "kind": "drain"},  # 5 s in which it stops
        {"time": 75, "kind": "attempt", "nodes": ["b"]},
        {"time": 80, "kind": "first_step"},  # 5 s down
        {"time": 100, "kind": "finish"},
        {"time": 9000, "kind": "launch"},
        {"time": 9001, "kind": "attempt", "nodes": ["a", "b"]},
        {"time": 9010, "kind": "first_step"},  # 10 s down
        {"time": 9100, "kind": "finish"},
    ]
    record = split_time(events)
    assert record.attempts == 4 and record.nodes == 2 and record.downtime_seconds == 55 and record.seconds == 200
    assert record.share == 0.725
    assert split_time(events[:5], now=53).downtime_seconds == 10 + 3 and split_time(events[:3], now=20).share == 0.5
    assert split_time([]).share == 0
