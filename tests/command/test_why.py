"""`sluice why`: a run that makes progress, a run that hangs now, and a run that has ended."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cluster.cause import Cause, Kind
from cluster.comm_ring import HEADER, CommRing, read_traces
from cluster.incident import describe_incident, write_incident
from cluster.judgement import Fault, Judgement
from cluster.run_files import ring_path
from conf.errors import EXIT_CRASH, EXIT_OK, EXIT_USER
from conf.schema import ROOT
from tests.small import Started
from train.command.why import main


def ask(capsys, folder: Path, *words: str) -> str:
    assert main([*words, f"runs={folder}"]) == EXIT_OK
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ((), "needs the name of one run"),
        (("a", "b"), "needs the name of one run"),
        (("a", "--fast"), "is not a flag"),
        (("a",), "there is no run in"),
    ],
)
def test_wrong_words_have_a_cure(tmp_path, capsys, words, error):
    assert main([*words, f"runs={tmp_path}"]) == EXIT_USER
    said = "".join(capsys.readouterr())
    assert error in " ".join(said.split()) and "sluice" in said


def test_a_run_that_is_over_is_told_by_its_newest_incident(tmp_path, capsys):
    logs = tmp_path / "one" / "logs"
    logs.mkdir(parents=True)
    assert ask(capsys, tmp_path, "one") == "one has had no failure so far\n"
    (tmp_path / "one" / "events.jsonl").write_text(
        json.dumps({"time": 1, "kind": "failure", "attempt": 1, "text": "node lost"}) + "\n"
    )
    assert ask(capsys, tmp_path, "one") == "the last failure: node lost\n"
    for rank, fault in ((3, Fault.loader), (5, Fault.lock)):
        found = Judgement(fault, (rank,), f"rank {rank} {fault.value}", "file.py:7")
        path = write_incident(logs, describe_incident(Cause(Kind.hang, found.text, (rank,)), found, {}, {}))
        os.utime(path, (rank, rank))
    (logs / "incident_9.json").write_text("{")
    said = ask(capsys, tmp_path, "one")
    assert "culprit: rank 5\n" in said and "where:   file.py:7" in said and str(logs / "incident_2.json") in said
    assert json.loads(ask(capsys, tmp_path, "one", "--json"))["fault"] == "lock"


def test_a_ring_whose_process_is_another_one_by_now_is_no_run_that_lives(tmp_path, capsys):
    ring = CommRing(ring_path(tmp_path / "one" / "logs", 0), 0, 1)
    ring.enter("data", 3)
    assert "one makes progress: 1 ranks, step 3" in ask(capsys, tmp_path, "one")
    path = ring_path(tmp_path / "one" / "logs", 0)
    values = list(HEADER.unpack_from(raw := bytearray(path.read_bytes())))
    other = subprocess.Popen(["sleep", "600"])
    values[5] = other.pid  # it has the number of the rank by now
    HEADER.pack_into(raw, 0, *values)
    path.write_bytes(raw)
    assert ask(capsys, tmp_path, "one") == "one has had no failure so far\n"
    other.kill()
    other.wait()


@pytest.mark.slow
def test_a_run_that_hangs_now_is_looked_at_from_outside(tmp_path, capsys):
    settings = (
        "parallel.dp=2",
        "steps=100000",
        "name=asked",
        "checkpoint.every=0",
        "log.validate_every=0",
        "log.progress=false",
        "cluster.kill_after=10",
    )
    run, logs = Started(tmp_path, *settings), tmp_path / "runs" / "asked" / "logs"
    try:
        for _ in range(600):
            traces = read_traces(logs)
            if len(traces) == 2 and min(trace.step for trace in traces.values()) > 5:
                break
            time.sleep(0.2)
        os.kill(traces[1].pid, signal.SIGSTOP)
        time.sleep(3.0)
        said = ask(capsys, tmp_path / "runs", "asked")
        assert (
            "asked has made no progress for" in said and "culprit: rank 1\n" in said and "rank 1 is stopped" in said
        ), said
        example = (ROOT / "train/docs/why.md").read_text().partition("\n    asked has")[2]
        shapes = [
            re.sub(r"steps? [\d to]+|[\d.]+", "N", text.split("where:")[0]).split()
            for text in (f"asked has{example}", said)
        ]
        assert shapes[0] == shapes[1], "the page shows what is printed"
        assert "waits:   rank 0 for 1, " in said and f"kill -CONT {traces[1].pid}" in said
        code, output = run.end(100)  # the run itself sees it too
    finally:
        run.kill()
        for trace in traces.values():
            if (
                Path(f"/proc/{trace.pid}/cmdline").exists()
                and b"asked" in Path(f"/proc/{trace.pid}/cmdline").read_bytes()
            ):
                os.kill(trace.pid, signal.SIGKILL)
    assert code == EXIT_CRASH and "rank 1 is stopped" in output
    said = ask(capsys, tmp_path / "runs", "asked")
    assert "culprit: rank 1\n" in said and "incident_2.json" in said, "the first was the warning"
    assert "find out what stopped it" in said and "CONT" not in said, "nobody is there any more who could go on"
