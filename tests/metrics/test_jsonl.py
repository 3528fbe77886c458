"""metrics.jsonl has every step once, whatever happened to earlier processes."""

import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from train.metrics.jsonl import JsonlSink, encode_record, read_heads, read_steps
from train.metrics.names import LAYERS, LAYERS_MARK, SCALARS
from train.show.screens import Progress
from train.show.writer import MetricsWriter


def record(step: int, **more: object) -> dict:
    return {"step": step, "loss": 1.0 / step, **more}


def sink(path, resumed_step=0, notes=None):
    return JsonlSink(path, resumed_step, (notes if notes is not None else []).append)


def steps(path) -> list[int]:
    return [line["step"] for line in read_heads(path)]


def test_line_is_strict_json_in_the_order_of_the_table():
    line = encode_record(
        {
            "load": {"layers.1": torch.tensor([3, 0]), "mtp.0": np.array([1, 2])},
            "layer_max_vio": {"layers.1": 0.5, "mtp.0": 1.0},
            "loss": float("nan"),
            "grad_norm": torch.tensor(0.1),
            "mtp_loss_2": 2.0,
            "mtp_loss_1": 1.0,
            "step": 7,
        }
    )
    parsed = json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert list(parsed) == ["step", "loss", "mtp_loss_1", "mtp_loss_2", "grad_norm", "layer_max_vio", "load"]
    assert parsed["loss"] is None and parsed["grad_norm"] == 0.1
    assert parsed["load"] == {"layers.1": [3, 0], "mtp.0": [1, 2]}
    assert line.endswith(b"\n") and line.count(b"\n") == 1


def test_a_name_outside_the_table_is_a_bug():
    with pytest.raises(AssertionError, match="lossy"):
        encode_record({"step": 1, "lossy": 2.0})


def test_table_has_no_name_twice_and_layers_come_last():
    names = [metric.name for metric in SCALARS + LAYERS]
    assert len(set(names)) == len(names)
    line = encode_record({"step": 1, LAYERS[0].name: {}})
    assert LAYERS_MARK in line


@pytest.mark.parametrize("torn", [b"", b'{"step":10,"lo', b'{"step":3'])
def test_resume_cuts_behind_the_resumed_step_and_tolerates_a_torn_line(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    first = sink(path)
    for step in range(1, 10):
        first.write(record(step))
    with open(path, "ab") as file:
        file.write(torn)
    again = sink(path, resumed_step=6)
    for step in range(7, 9):
        again.write(record(step))
    assert steps(path) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_a_new_run_starts_an_empty_file(tmp_path):
    sink(tmp_path / "metrics.jsonl").write(record(1))
    sink(tmp_path / "metrics.jsonl")
    assert steps(tmp_path / "metrics.jsonl") == []


def test_nothing_is_lost_at_kill_9(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from train.metrics.jsonl import JsonlSink\n"
        "s = JsonlSink(Path(sys.argv[1]), 0, print)\n"
        "for step in range(1, 51): s.write({'step': step, 'loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    result = subprocess.run([sys.executable, "-c", code, tmp_path / "metrics.jsonl"], timeout=60)
    assert result.returncode == -signal.SIGKILL
    assert steps(tmp_path / "metrics.jsonl") == list(range(1, 51))


def test_lines_that_a_full_disk_refuses_wait_for_room(tmp_path):
    notes: list[str] = []
    path = tmp_path / "metrics.jsonl"
    metrics = sink(path, notes=notes)
    metrics.write(record(1))
    good, metrics._file = metrics._file, _Full(metrics._file)
    metrics.write(record(2))
    metrics.write(record(3))
    assert steps(path) == [1] and len(notes) == 1 and "No space left" in notes[0]
    metrics._file = good
    metrics.write(record(4))
    assert steps(path) == [1, 2, 3, 4] and path.read_bytes().count(b"\n") == 4
    assert len(notes) == 2 and "the 2 waiting lines are written" in notes[1]
    metrics._file = _Full(good)
    metrics.write(record(5))
    metrics._file = good
    metrics.close()
    assert steps(path) == [1, 2, 3, 4, 5] and len(notes) == 4


def test_lines_of_a_disk_that_stays_full_are_counted(tmp_path, monkeypatch):
    """And take no more than their share of memory."""
    monkeypatch.setattr("conf.disk.BACKLOG", 100)
    notes: list[str] = []
    metrics = sink(tmp_path / "metrics.jsonl", notes=notes)
    good, metrics._file = metrics._file, _Full(metrics._file)
    for step in range(1, 51):
        metrics.write(record(step))
    assert len(metrics._lines) < 10
    metrics._file.close = good.close
    metrics.close()
    assert len(notes) == 2 and "lacks its last 50 lines" in notes[1]


class _Full:
    """A file on a full disk: takes half of a line, then refuses."""

    def __init__(self, file):
        self.truncate, self._file = file.truncate, file

    def write(self, line: bytes) -> int:
        self._file.write(line[: len(line) // 2])
        raise OSError(28, os.strerror(28))


def test_heads_hold_scalars_and_lines_hold_layers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = sink(path)
    for step in (1, 2):
        metrics.write(record(step, grad_norm=math.inf, layer_max_vio={"mtp.0": 0.5}, load={"mtp.0": [1, 2]}))
    with open(path, "ab") as file:
        file.write(b"damaged\n")
    heads = list(read_heads(path))
    assert [list(head) for head in heads] == [["step", "loss", "grad_norm"]] * 2 and math.isnan(heads[0]["grad_norm"])
    assert [line["load"] for line in read_steps(path, {2})] == [{"mtp.0": [1, 2]}]


def test_a_large_model_writes_its_loads_now_and_then(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = sink(path)
    for step in range(1, 31):
        metrics.write(record(step, layer_max_vio={}, load={f"layers.{n}": [1] * 256 for n in range(59)}))
    written = [line["step"] for line in read_steps(path, range(100)) if "load" in line]
    assert written == [1, 15, 30]


def test_writer_thins_lines_but_keeps_first_last_and_validated_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter([sink(path)], Progress("t", 25, enabled=False), every=10, last_step=25)
    with writer:
        given = {n: writer.write(record(n, **({"validation_loss": 1.0} if n == 13 else {}))) for n in range(1, 26)}
    assert steps(path) == [step for step, went in given.items() if went] == [1, 10, 13, 20, 25]
