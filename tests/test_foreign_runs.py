"""A run folder of somebody else's: looking at it, or going on in it, changes no other file, signals nobody, and ends in no traceback."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.cause import Cause, Kind, read_report
from cluster.comm_ring import HEADER, NOW, NOW_AT, RECORDS_AT, TABLE_AT, CommRing, read_traces, ring_path
from cluster.driver.journal import EVENT_KINDS, Journal, read_events
from cluster.incident import describe_incident, incident_screen, newest_incident, write_incident
from cluster.judgement import Fault, Judgement
from cluster.local import run_local
from cluster.run_files import failure_path, log_path, progress_path, read_fence, stacks_path
from cluster.spawn import holds_open
from cluster.stacks import ask_stacks, gather_stacks
from conf.errors import EXIT_OK, UserError
from conf.files import open_plain
from conf.load import compose
from tests.small import arguments
from train.checkpoint.run_folder import RunFolder, is_held
from train.command.top_state import read_picture
from train.command.why import main as why
from train.loop.finish import finish_run
from train.show.report import write_report

KEPT = "a file of mine"


@pytest.fixture
def mine(tmp_path) -> Path:
    """A file outside of the run folder, which must stay as it is."""
    path = tmp_path / "mine.txt"
    path.write_text(KEPT)
    return path


@pytest.fixture
def logs(tmp_path) -> Path:
    folder = tmp_path / "runs" / "one" / "logs"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def bystander(tmp_path):
    """A process of this user that notes every SIGUSR1, and has nothing to do with the run."""
    mark = tmp_path / "signalled"
    program = (
        "import pathlib, signal, sys, time; mark = pathlib.Path(sys.argv[1]); "
        "signal.signal(signal.SIGUSR1, lambda *_: mark.with_suffix('.yes').touch()); mark.touch(); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(mark)])
    while not mark.exists():
        time.sleep(0.01)
    yield process, mark.with_suffix(".yes")
    process.kill()
    process.wait()


def forge_ring(logs: Path, pid: int) -> None:
    """A ring of this host whose rank is that process, and has had no news for long."""
    CommRing(ring_path(logs, 0), 0, 1).close()
    raw = bytearray(ring_path(logs, 0).read_bytes())
    values = list(HEADER.unpack_from(raw))
    values[5], values[6] = pid, time.time()
    HEADER.pack_into(raw, 0, *values)
    now = list(NOW.unpack_from(raw, NOW_AT))
    NOW.pack_into(raw, NOW_AT, 3, *now[1:-1], time.time() - 60)
    ring_path(logs, 0).write_bytes(raw)


def test_only_plain_files_are_opened(tmp_path, mine):
    (tmp_path / "link").symlink_to(mine)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to(os.devnull)
    (tmp_path / "folder").mkdir()
    for name in ("link", "pipe", "device", "folder"):
        for mode in ("r", "w", "a", "r+"):
            with pytest.raises(OSError):
                open(tmp_path / name, mode, opener=open_plain)  # noqa: SIM115
    assert mine.read_text() == KEPT
    with open(mine, "w", opener=open_plain) as file:
        file.write("new")
    assert mine.read_text() == "new"


def test_why_neither_signals_a_process_that_a_forged_ring_names_nor_follows_a_link(
    tmp_path, logs, mine, bystander, capsys
):
    process, signalled = bystander
    forge_ring(logs, process.pid)
    stacks_path(logs, 0).symlink_to(mine)
    assert why(["one", f"runs={tmp_path / 'runs'}"]) == EXIT_OK
    assert "one has had no failure" in capsys.readouterr().out
    time.sleep(0.3)
    assert not signalled.exists() and mine.read_text() == KEPT
    assert ask_stacks(logs, 0, process.pid) and mine.read_text() == KEPT, "not even of a rank that can answer"


def test_a_rank_that_writes_its_ring_is_asked(logs):
    program = (
        "import pathlib, sys, time; from cluster.comm_ring import *; from cluster.stacks import answer_requests; "
        "logs = pathlib.Path(sys.argv[1]); answer_requests(logs, 0); ring = CommRing(ring_path(logs, 0), 0, 1); "
        "(logs / 'ready').touch(); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(logs)])
    try:
        while not (logs / "ready").exists():
            time.sleep(0.01)
        assert holds_open(process.pid, ring_path(logs, 0)) and not holds_open(os.getpid(), ring_path(logs, 0))
        assert "time.sleep" in program and 0 in gather_stacks(logs, {0: process.pid}, 20)
    finally:
        process.kill()
        process.wait()


def test_output_and_events_are_not_written_through_a_link(logs, mine):
    for path in (log_path(logs, 1), logs.parent / "events.jsonl"):
        path.symlink_to(mine)
    with pytest.raises(OSError):
        run_local([sys.executable, "-c", ""], 2, logs)
    said = []
    journal = Journal(logs.parent, said.append)
    journal.output(1, b"words")
    journal.write("launch", 0, "begun")
    assert mine.read_text() == KEPT and "not a plain file" in said[0]


@pytest.mark.parametrize("name", [".lock", ".rank_0.lock", "checkpoints/.fence"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_link_or_a_pipe_in_the_place_of_a_lock_is_an_error_with_its_cure(tmp_path, mine, name, kind):
    config = compose(*arguments(tmp_path, "name=one"))
    place = Path(config.runs) / "one" / name
    place.parent.mkdir(parents=True)
    place.symlink_to(mine) if kind == "link" else os.mkfifo(place)
    with pytest.raises(UserError) as caught:
        read_fence(place.parent) if name.endswith("fence") else RunFolder(config)
    assert str(place) in str(caught.value) and "plain file" in str(caught.value)
    assert not is_held(Path(config.runs) / "one") and mine.read_text() == KEPT


def incident(**more) -> dict:
    found = Judgement(Fault.absent, (1,), "rank 1 does not come", "file.py:7")
    return describe_incident(Cause(Kind.hang, found.text, (1,)), found, {}, {}) | more


WAIT = {"rank": 0, "for": [1], "what": "all_reduce", "place": "", "seconds": 1.0}
MALFORMED = [
    "{", "[]", "7", "null", "[" * 100_000, '{"time": ' + "9" * 5000 + "}", json.dumps({"text": "", "fault": "", "ranks": [], "waits": []}),
    *(json.dumps(incident(**{name: value})) for name, value in (
        ("time", 1e300), ("time", float("nan")), ("time", "now"), ("text", 3), ("text", None), ("ranks", 3), ("ranks", ["1"]), ("among", None),
        ("where", []), ("advice", {}), ("waits", 1), ("waits", [1]), ("waits", [WAIT | {"for": "x"}]), ("waits", [WAIT | {"seconds": "x"}]),
        ("waits", [WAIT | {"seconds": float("inf")}]), ("waits", [{}]), ("kind", 1),
    )),
]  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_incident_is_passed_over_by_all_who_read_it(tmp_path, logs, capsys, text):
    (logs / "incident_1.json").write_text(text)
    (logs / "incident_x.json").write_text("{}")
    (logs / "incident_2.json").symlink_to("nowhere")
    assert newest_incident(logs) is None
    assert why(["one", f"runs={tmp_path / 'runs'}"]) == EXIT_OK
    assert "has had no failure" in capsys.readouterr().out
    assert read_picture(logs.parent, "one")["events"] == [] and write_report(logs.parent).is_file()
    path = write_incident(logs, incident())
    assert path.name == "incident_3.json" and newest_incident(logs)[0] == path


def test_a_report_that_cannot_be_made_does_not_fail_the_run(tmp_path, logs, capsys):
    config = compose(*arguments(tmp_path, "name=one", "steps=1"))
    run = Path(config.runs) / "one"
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "logs").mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text('{"step":1,"main_loss":2.0,"seconds":1.0}\n')
    events = [{"time": 5.0, "kind": kind, "attempt": 1, "text": "x"} for kind in EVENT_KINDS]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    finish_run(config, EXIT_OK, 1.0, None, None)
    assert "1 steps complete" in "".join(capsys.readouterr())
    assert "Left out: cluster" in (run / "report.html").read_text(), "the rest of the page is there"
    (run / "sample.json").write_text('{"step": 1, "earlier": 5}')
    (run / "plan.json").write_text("[]")
    finish_run(config, EXIT_OK, 1.0, None, None)
    said = " ".join("".join(capsys.readouterr()).split())
    assert (
        "1 steps complete" in said
        and "not written" in said
        and "sample.json is damaged" in said
        and "the plan of this run could not be computed" in said
    )


def test_no_field_of_an_incident_forges_a_line(logs):
    forged = "x\n  to do:   run `rm -r`\x85y\u2028z"
    found = incident(
        text=f"a{forged}\n  what failed of it: b{forged}",
        where=forged,
        advice=forged,
        waits=[WAIT | {"what": forged, "place": forged}],
    )
    lines = incident_screen(found, Path("/x\ny")).split("\n")
    assert [
        line for line in lines if "rm -r" in line and not line.startswith(("  where:", "  waits:", "  to do:   x"))
    ] == []
    assert sum(line.startswith("  to do:") for line in lines) == 1 and len(lines) == 7


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", '{"rank": 0}', '{"step": "x", "phase": 1}', '{"step": 1, "phase": "step", "busy": []}',
    '{"rank": 0, "time": "x", "kind": "", "message": "", "code": 1, "ranks": []}', '{"rank": 0, "time": 1, "kind": "", "message": "", "code": 1, "ranks": [], "own": 1}'])  # fmt: skip
def test_what_a_rank_did_not_write_is_no_report_of_it(logs, text):
    progress_path(logs, 0).write_text(text)
    failure_path(logs, 0).write_text(text)
    report = read_report(0, 1, logs)
    assert report.failure is None and report.busy is None


def test_a_ring_with_anything_in_it_gives_records_or_none(logs):
    lines = [
        "[" * 50_000,
        '["group", [], {}, [1]]',
        '["group", "a", "b", [0, 1000000000000, 1]]',
        '["group", "a", "b", [0, 9, 0]]',
        '["place", [], 1]',
        "7",
    ]
    for line in lines:
        ring = CommRing(ring_path(logs, 0), 0, 1)
        ring.end(ring.begin(1, 1, "barrier", "", 0, 0, -1, 1))
        ring.close()
        raw = bytearray(ring_path(logs, 0).read_bytes())
        text = f"{line}\n".encode()[: RECORDS_AT - TABLE_AT]
        raw[TABLE_AT : TABLE_AT + len(text)] = text
        ring_path(logs, 0).write_bytes(raw)
        (trace,) = read_traces(logs).values()
        assert len(trace.records) == 1 and trace.records[0].group.label == "?"


def test_events_with_times_that_are_none_are_left_out(logs):
    event = {"kind": "failure", "attempt": 1, "text": "x"}
    (logs.parent / "events.jsonl").write_text(
        "".join(json.dumps(event | {"time": at}) + "\n" for at in (1e300, float("nan"), -1, 5.0))
    )
    assert [one["time"] for one in read_events(logs.parent)] == [5.0]
