"""Attempts, nodes and goodput of a run on a cluster, in metrics.jsonl, W&B and the report."""

import json
import time

import pytest

from cluster.driver.journal import Journal, read_events
from conf.load import compose
from tests.disks import fill, small_disk
from tests.show.wandb_file import history
from train.metrics.jsonl import read_heads
from train.metrics.wall_time import GoodputRecord
from train.show.report import write_report
from train.show.writer import open_writer


@pytest.fixture
def journal(tmp_path):
    """A run that started 100 s ago, took 10 s to its first step, and lost 30 s to a failure."""
    journal, began = Journal(tmp_path), time.time() - 100
    events = [
        (0, "launch", {}),
        (1, "attempt", {"nodes": ["a", "b", "c"]}),
        (10, "first_step", {}),
        (60, "failure", {"text": "rank 1 on <b> ended"}),
        (61, "attempt", {"nodes": ["a", "c"]}),
        (90, "first_step", {}),
    ]
    with (tmp_path / "events.jsonl").open("w") as file:
        for after, kind, fields in events:
            file.write(json.dumps({"time": began + after, "kind": kind, "attempt": 1, "text": kind, **fields}) + "\n")
    return journal


def test_a_full_disk_costs_no_event_and_is_told_once(tmp_path):
    notes = []
    with small_disk(tmp_path / "disk", "200k") as disk:
        journal = Journal(disk, notes.append)
        journal.write("launch", 0, "first")
        ballast = fill(disk)
        for _ in range(200):
            journal.write("node_lost", 1, "x" * 100, node="n0")
            journal.output(0, b"y" * 100)
        assert len(notes) == 1 and f"the disk at {disk} has" in notes[0] and "the run continues" in notes[0]
        ballast.unlink()
        journal.write("finish", 1, "last", code=0)
        events = read_events(disk)
        assert [events[0]["text"], events[-1]["text"]] == ["first", "last"] and len(events) == 202
        assert (disk / "events.jsonl").read_bytes().count(b"\n") == len(events)
        (disk / "events.jsonl").unlink()
        assert GoodputRecord(disk)()["cluster/attempt"] == 0


def test_every_step_of_a_supervised_run_has_the_figures(tmp_path, journal, monkeypatch):
    monkeypatch.setenv("SLUICE_ATTEMPT", "2")
    with open_writer(compose("conf=tiny", "steps=2", "log.wandb=offline"), tmp_path) as writer:
        writer.write({"step": 1, "loss": 2.0})
        journal.write("attempt", 3, "attempt 3", nodes=["a"])
        writer.write({"step": 2, "loss": 2.0})
    first, second = read_heads(tmp_path / "metrics.jsonl")
    assert first["cluster/attempt"] == 2 and first["cluster/nodes"] == 2
    assert first["cluster/downtime_seconds"] == pytest.approx(40, abs=1)
    assert first["cluster/goodput"] == pytest.approx(0.6, abs=0.05)
    assert second["cluster/attempt"] == 3 and second["cluster/nodes"] == 1
    assert history(tmp_path)[1]["cluster/attempt"] == 3


def test_a_run_of_its_own_has_none(tmp_path):
    with open_writer(compose("conf=tiny", "steps=1", "log.wandb=disabled"), tmp_path) as writer:
        writer.write({"step": 1})
    assert list(next(read_heads(tmp_path / "metrics.jsonl"))) == ["step"]


def test_the_report_tells_what_happened(tmp_path, journal):
    journal.write("checkpoint", 2, "step 7", step=7)
    page = write_report(tmp_path).read_text()
    assert "On the cluster" in page and "2 attempts, the newest on 2 nodes" in page
    assert "rank 1 on &lt;b&gt; ended" in page and "step 7" not in page
