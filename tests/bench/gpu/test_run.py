"""Whatever a check does, the other checks of its part run, each line has a verdict and a reason, and the time limit
holds."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import torch

import bench.gpu.__main__ as command
from bench.gpu import cards, ranks, training
from bench.gpu.line import FAIL, NOT_TRIED, PASS, Line, make_line
from bench.gpu.page import draw, shown
from bench.gpu.parts import MINUTES, PARTS, fitting
from bench.gpu.run import follow
from bench.gpu.timing import medians
from bench.gpu.verdict import GpuVerdict, PartFound
from conf.schema import ROOT

SCHEMA = json.loads((ROOT / "bench" / "gpu" / "verdict.schema.json").read_text())


def lines_of(kind: str, folder: Path, seconds: float = 200.0) -> tuple[dict[str, Line], list[Line]]:
    """By name, and as they were shown."""
    shown: list[Line] = []
    command = [sys.executable, "-m", "tests.bench.gpu.misbehaving", kind]
    lines = follow(command, folder, time.monotonic() + seconds, shown.append)
    return {line.name: line for line in lines}, shown


@pytest.mark.slow
def test_a_check_that_raises_crashes_hangs_or_breaks_the_context_takes_no_other_with_it(tmp_path):
    lines, shown = lines_of("all", tmp_path)
    assert [line.name for line in shown] == list(lines)
    verdicts = {name: line.verdict for name, line in lines.items()}
    assert verdicts == {
        "first": PASS, "raises": FAIL, "not tried": NOT_TRIED, "breaks the context": FAIL, "crashes": FAIL, "exits": FAIL,
        "writes half a line": FAIL, "hangs": FAIL, "wrong": FAIL, "last": PASS,
    }  # fmt: skip
    assert lines["first"].figures == {"milliseconds": 1.5} and lines["first"].bound == "less than 2"
    assert "illegal memory access" in lines["raises"].reason and "misbehaving.py:" in lines["raises"].reason
    assert lines["not tried"].reason == "TransformerEngine is not installed"
    assert "SIGSEGV" in lines["crashes"].reason and "misbehaving.py:" in lines["crashes"].reason
    assert "exit code 3" in lines["exits"].reason
    assert lines["hangs"].reason.startswith("hung") and "misbehaving.py:" in lines["hangs"].reason
    assert lines["wrong"].figures == {"error": "nan"}
    assert str(ROOT) not in " ".join(line.reason for line in lines.values())


@pytest.mark.slow
def test_a_part_ends_with_its_time(tmp_path):
    began = time.monotonic()
    lines, _ = lines_of(
        "late", tmp_path, seconds=6.0
    )  # to start a process takes seconds of them where the machine is busy
    assert time.monotonic() - began < 50  # the check that hangs does so for 60
    assert lines["first"].verdict == PASS
    assert lines["hangs"].verdict == NOT_TRIED and "time was over, and it was not done" in lines["hangs"].reason
    assert lines["last"].verdict == NOT_TRIED and lines["last"].reason == "its part's time was over"


def test_a_part_that_cannot_start_is_one_line_that_fails(tmp_path):
    lines, _ = lines_of("import_error", tmp_path)
    (line,) = lines.values()
    assert line.verdict == FAIL and "libcudart.so.13" in line.reason


def test_a_visit_has_all_parts_but_the_last_two_and_none_is_begun_without_time(monkeypatch):
    assert fitting(PARTS, MINUTES) == list(PARTS)[:-2] and list(PARTS)[-2:] == ["peers", "curve"]
    assert fitting(PARTS, 17) == list(PARTS)
    monkeypatch.setattr(command, "run_part", lambda *arguments: pytest.fail("a part was begun"))
    found = command.run(next(iter(PARTS.values())), "cpu", time.monotonic() - 1)
    (line,) = found.lines
    assert line.verdict == NOT_TRIED and "minutes were over" in line.reason


def test_a_part_has_at_least_the_time_of_its_ranks():
    """Each layout starts nine processes, so that what its checks may take is about what they need."""
    checks = ranks.checks(SimpleNamespace(on_gpu=True))
    assert len(checks) == len(ranks.LAYOUTS)
    assert sum(check.limit for check in checks) <= PARTS["ranks"].seconds


def test_an_error_of_nccl_fails_its_line_and_one_card_is_not_tried(monkeypatch):
    machine = SimpleNamespace(on_gpu=True, device=torch.device("cuda"), patience=1.0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert {make_line(check).verdict for check in cards.checks(machine)} == {NOT_TRIED}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def broken(*given):
        raise RuntimeError("rank 1: NCCL error: unhandled system error")

    monkeypatch.setattr(cards, "run_ranks", broken)
    monkeypatch.setattr(cards, "layout", broken)
    lines = [make_line(check) for check in cards.checks(machine)]
    assert all(line.verdict == FAIL and "NCCL error" in line.reason for line in lines) and len(lines) == 4


def test_clocks_are_medians_of_what_the_card_says():
    said = "1980, 2619, 512.11, 61\n1755, 2619, 690.02, 63\n1410, 2619, 699.87, [N/A]\n14"
    assert medians(said) == {
        "clock (MHz)": 1755,
        "memory clock (MHz)": 2619,
        "power (W)": 690.02,
        "temperature (C)": 62,
    }
    assert medians("") == {}


def test_first_steps_that_compile_late_do_not_learn_or_take_more_than_planned_fail():
    line = {
        "step_seconds": 0.1,
        "main_loss": 8.0,
        "kernels_compiled": 0,
        "memory_bytes": 10,
        "memory_predicted_bytes": 10,
    }
    lines = [line | {"step_seconds": 30.0}, *(line | {"main_loss": 7.9 - step / 100} for step in range(19))]
    found = training.judge(lines, 20)
    assert found.problem is None and found.figures["first step (s)"] == 30.0
    assert "0 of 20" in training.judge([], 20).problem
    assert "3 kernels" in training.judge([*lines[:-1], lines[-1] | {"kernels_compiled": 3}], 20).problem
    assert "1.30 of the plan" in training.judge([*lines[:-1], lines[-1] | {"memory_bytes": 13}], 20).problem
    assert "does not fall" in training.judge([line] * 20, 20).problem


def test_what_a_short_run_leaves_out_is_said_before_it_starts(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "run_part", lambda name, *arguments: print(f"begun: {name}") or [Line(name, PASS)])
    monkeypatch.setattr("sys.argv", ["gpu", "--device", "cpu", "--minutes", "5", "--out", str(tmp_path)])
    assert command.main() == 0
    said = capsys.readouterr().out
    assert said.index("left out: ranks, which may take") < said.index("begun: environment")
    record = json.loads((tmp_path / "gpu.json").read_text())
    jsonschema.validate(record, SCHEMA)
    done = [part["name"] for part in record["parts"] if part["allowed_seconds"]]
    assert sum(PARTS[name].seconds for name in done) <= 300 and "ranks" not in done
    (line,) = next(part for part in record["parts"] if part["name"] == "ranks")["lines"]
    assert line["verdict"] == NOT_TRIED and "of 5 minutes" in line["reason"]


@pytest.mark.parametrize("word", ["0", "-1", "nan", "inf", "soon"])
def test_minutes_are_a_number_above_0(word, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu", "--minutes", word])
    with pytest.raises(SystemExit):
        command.main()
    assert "--minutes" in capsys.readouterr().err


@pytest.mark.parametrize(("line", "code"), [(Line("one", PASS), 0), (Line("one", FAIL, "<b>wrong</b>"), 1)])
def test_the_command_writes_page_and_file_and_fails_where_a_line_does(line, code, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "run_part", lambda *arguments: [line, Line("two", NOT_TRIED, "no GPU")])
    monkeypatch.setattr("sys.argv", ["gpu", "--device", "cpu", "--minutes", "20", "--out", str(tmp_path)])
    assert command.main() == code
    record = json.loads((tmp_path / "gpu.json").read_text())
    jsonschema.validate(record, SCHEMA)
    assert [part["name"] for part in record["parts"]] == list(PARTS) and record["complete"] and not record["on_gpu"]
    assert record["counts"][FAIL] == code * len(PARTS)
    page = (tmp_path / "gpu.html").read_text()
    assert "Nothing on this page ran on a GPU" in page and "<b>wrong</b>" not in page
    assert "nothing of this ran on a GPU" in capsys.readouterr().out


def test_a_line_that_fails_without_a_reason_breaks_the_schema():
    verdict = GpuVerdict(True, "H100", {})
    verdict.parts.append(PartFound("environment", "title", 1.0, 2.0, [Line("one", FAIL)]))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(verdict.record(), SCHEMA)


def test_a_run_that_was_cut_off_says_so_and_a_complete_one_on_a_gpu_is_no_dry_check():
    verdict = GpuVerdict(True, "H100", {"torch": "2.13"})
    assert "not complete" in draw(verdict)
    verdict.complete = True
    assert "not complete" not in draw(verdict) and "Dry check" not in draw(verdict)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234.5, "1234"),
        (12.345, "12.3"),
        (0.5, "0.500"),
        (0.0123, "0.01230"),
        (1e-5, "1.00e-05"),
        (0.0, "0"),
        (3, "3"),
        (None, ""),
    ],
)
def test_figures_have_three_or_four_digits(value, text):
    assert shown(value) == text
