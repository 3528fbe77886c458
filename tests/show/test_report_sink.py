"""The report of a training run: a separate process writes it, and never after the final report."""

import fcntl
import json
import os
import time

import pytest

from tests.show.synthetic import write_run
from tests.show.test_report import outline
from train.show import writer
from train.show.report import TRUSTED, write_report
from train.show.writer import ReportSink


@pytest.mark.slow
def test_it_is_written_beside_the_training_and_not_again_at_once(tmp_path):
    run = write_run(tmp_path / "run", 3)
    sink = ReportSink(run, 0.01)
    sink.write({"step": 1})
    time.sleep(0.05)
    sink.write({"step": 2})
    child = sink._child
    assert child is not None and child.wait(timeout=280) == 0
    assert "Training report" in (run / "report.html").read_text()
    sink.write({"step": 3})
    time.sleep(0.05)
    sink.write({"step": 4})
    assert sink._child is None, "the pause is ten times what the writing took"
    sink.close()


def test_none_is_written_after_the_end(tmp_path):
    run = write_run(tmp_path / "run", 3)
    sink = ReportSink(run, 0.01)
    sink._next = 0.0
    sink.write({"step": 1})
    child = sink._child
    (run / ".report.html.0.tmp").write_text("begun")
    sink.close()
    assert child.poll() is not None and not (run / "report.html").exists() and not list(run.glob(".report*"))


def test_the_first_of_a_long_run_comes_soon_and_none_of_a_short_one(tmp_path, monkeypatch):
    sink = ReportSink(tmp_path, 300.0)
    sink.write({"step": 1})
    assert sink._child is None and sink._next - sink._began == writer.FIRST_REPORT
    sink.close()


@pytest.mark.slow
def test_the_page_loads_itself_again_only_while_the_run_trains(tmp_path):
    run = write_run(tmp_path / "run", 3)
    assert "location.reload" not in write_report(run).read_text()
    handle = os.open(run / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        began = time.time()
        page = write_report(run).read_text()
        assert "The run trains" not in write_report(run, ended=True).read_text(), "its own process writes the last one"
    finally:
        os.close(handle)
    until = float(page.split("Date.now() < ")[1].split(")")[0]) / 1000
    assert TRUSTED < until - began < TRUSTED + 301, "a page that nobody writes anew comes to rest"
    assert "The run trains" in page
    assert "location.reload" not in write_report(run).read_text()


def test_what_the_model_wrote_before_stands_below(tmp_path):
    run = write_run(tmp_path / "run", 3)
    texts = [{"step": step, "temperature": 0.8, "text": f"text {step} <b>"} for step in (10, 20, 30)]
    (run / "sample.json").write_text(json.dumps(texts[2] | {"earlier": texts[:2]}))
    text = " ".join(outline(write_report(run)).text)
    assert text.index("text 30 <b>") < text.index("text 20 <b>") < text.index("text 10 <b>")


@pytest.mark.slow
def test_the_figure_of_the_paper_is_set_beside_gpus_alone(tmp_path):
    run = write_run(tmp_path / "run", 3)
    start = {"time": 1.0, "command": "c", "folder": "f", "commit": None, "modified": False, "ranks": 1, "versions": {}}
    machine = {"host": "h", "system": "s", "device": "d", "cores": 1, "memory_bytes": 1}
    for told, shown in ((None, False), (False, False), (True, True)):
        has = machine if told is None else machine | {"is_gpu": told}
        (run / "starts.json").write_text(json.dumps([start | {"machine": has}]))
        assert ("38.9" in " ".join(outline(write_report(run)).text)) is shown
