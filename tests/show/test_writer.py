"""The writer opens the sinks that a configuration selects."""

import subprocess
import sys

import pytest

from conf.load import compose
from tests.show.wandb_file import history, records
from train.metrics.jsonl import read_heads
from train.show.writer import open_writer


@pytest.mark.slow
def test_all_sinks_get_every_step_and_closing_twice_is_fine(tmp_path, capsys):
    writer = open_writer(compose("conf=tiny", "steps=3", "log.wandb=offline"), tmp_path)
    with writer:
        writer.event("validation")
        for step in (1, 2, 3):
            writer.write({"step": step, "loss": 2.0})
        writer.note("a note")
        writer.close()
        assert writer.wandb_run is not None and writer.wandb_run.startswith(str(tmp_path / "wandb/offline-run-"))
    assert [line["step"] for line in read_heads(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [line["_step"] for line in history(tmp_path)] == [1, 2, 3]
    assert capsys.readouterr().out.splitlines()[-1] == "a note"


@pytest.mark.slow
def test_the_jobs_of_a_sweep_are_one_group_of_wandb(tmp_path):
    for job in (0, 1):
        with open_writer(compose(f"name=rates/{job}", "log.wandb=offline"), tmp_path / str(job)) as writer:
            writer.write({"step": 1, "loss": 2.0})
    files = tmp_path.glob("*/wandb/offline-run-*/*.wandb")
    runs = [next(record.run for record in records(file) if record.HasField("run")) for file in files]
    assert sorted((run.run_group, run.display_name) for run in runs) == [("rates", "rates/0"), ("rates", "rates/1")]


def test_resuming_shows_and_keeps_the_steps_before(tmp_path, capsys):
    config = compose("conf=tiny", "steps=4", "log.wandb=disabled")
    with open_writer(config, tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write({"step": step})
    with open_writer(config, tmp_path, resumed_step=2) as writer:
        writer.write({"step": 3})
        assert writer.wandb_run is None
    assert [line["step"] for line in read_heads(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert not (tmp_path / "wandb").exists()


@pytest.mark.slow
def test_importing_the_writer_loads_neither_wandb_nor_plotly():
    code = "import sys, train.show.writer; print([m for m in ('wandb', 'plotly', 'torch') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == "[]\n"
