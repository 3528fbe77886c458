"""A plan's memory and time are shown beside the measured ones if plan and run have the same recipe and device."""

import json
from dataclasses import asdict

import pytest
import torch
from rich.console import Console

from conf.errors import EXIT_OK
from conf.load import compose, write_config
from conf.schema import ROOT, Rate
from train.kernels.choice import build_kernels
from train.kernels.cpu.processor import cpu_name
from train.metrics.jsonl import read_heads
from train.plan.run import run_plan
from train.show.planned import plan_rows, plan_words, planned
from train.show.report import write_report
from train.show.screens import final_screen
from train.show.series import read_series
from train.show.writer import open_writer

LOG = ["log.wandb=disabled", "log.progress=false"]


@pytest.fixture(scope="module")
def planned_run(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    config = compose("mode=plan", "hardware=h100", "name=a", f"runs={runs}", *LOG)
    assert run_plan(config) == EXIT_OK
    return config, runs / "a"


@pytest.fixture(scope="module")
def planned_here(tmp_path_factory):
    """The same for this very processor, with made-up rates."""
    runs = tmp_path_factory.mktemp("runs")
    rate = asdict(Rate(1e-6, 1e12, 1e11))
    kinds = ("fprop_bf16", "fprop_fp32", "wgrad_bf16", "attention_forward", "attention_backward", "memory", "inside")
    rates = dict.fromkeys(kinds, rate)
    content = {
        "device": cpu_name(),
        "precision": "bf16",
        "threads": torch.get_num_threads(),
        "rates_alone": rates,
        "rates_together": rates,
    }
    content |= {"compiled": list(build_kernels("cpu").parts), "factors_alone": {}, "factors_together": {}}
    (runs / "calibration.json").write_text(json.dumps(content))
    calibration = f"plan.calibration={runs / 'calibration.json'}"
    config = compose("mode=plan", "hardware=cpu", calibration, "name=a", f"runs={runs}", "cluster.device=cpu", *LOG)
    assert run_plan(config) == EXIT_OK
    return config, runs / "a"


def test_every_record_has_the_prediction(planned_run, monkeypatch):
    config, folder = planned_run
    predicted = json.loads((folder / "plan.json").read_text())["ranks"][0]["peak_bytes"]
    with open_writer(config, folder) as writer:
        writer.write({"step": 1, "memory_bytes": 5})
    assert list(read_heads(folder / "metrics.jsonl")) == [
        {"step": 1, "memory_bytes": 5, "memory_predicted_bytes": predicted}
    ]
    assert predicted > 10_000_000
    series = read_series(folder / "metrics.jsonl")
    assert plan_rows(folder, series)[0][::3] == ("memory of tensors", ""), "a run on a CPU, and a plan for GPUs"
    monkeypatch.setattr("train.show.planned.ran_on_gpu", lambda _: True)
    assert plan_rows(folder, series)[0][0] == "peak memory"


@pytest.mark.parametrize(
    "other",
    [
        "parallel.dp=2 batch_size=32",
        "micro_batch_size=8",
        "precision=fp32",
        "model.recompute=[norm]",
        "model.layers=5",
        "seq_len=128",
        "batch_size=32",
    ],
)
def test_a_plan_of_another_recipe_counts_for_nothing(planned_run, other):
    _, folder = planned_run
    assert planned(compose(*other.split(), "name=a"), folder) == {}


def test_the_page_describes_every_field(planned_run):
    page = (ROOT / "train" / "docs" / "plan.md").read_text()
    fields = json.loads((planned_run[1] / "plan.json").read_text()).keys()
    assert [field for field in fields if f"`{field}`" not in page] == []


def test_no_plan_is_no_prediction(tmp_path):
    assert planned(compose(), tmp_path) == {}


def test_step_time_is_predicted_for_this_very_device_only(planned_run, planned_here):
    config, folder = planned_run
    assert "step_predicted_seconds" not in planned(config, folder)
    config, folder = planned_here
    plan = json.loads((folder / "plan.json").read_text())
    assert planned(config, folder)["step_predicted_seconds"] == plan["step_seconds"] > 0
    for other in ({"device": "another"}, {"threads": torch.get_num_threads() + 1}):
        (folder / "plan.json").write_text(json.dumps(plan | other))
        assert "step_predicted_seconds" not in planned(config, folder)
    (folder / "plan.json").write_text(json.dumps(plan))


def test_report_and_last_screen_show_the_error_of_each_item(planned_here):
    config, folder = planned_here
    plan = json.loads((folder / "plan.json").read_text())
    write_config(config, str(folder / "config.yaml"))
    forward = plan["action_seconds"]["F"]
    with open_writer(config, folder) as writer:
        for step in (1, 2, 3):
            measured = {"step_seconds": 2 * plan["step_seconds"], "forward_seconds": 0.8 * forward}
            writer.write({"step": step, **measured, "memory_bytes": 2**30})
    rows = plan_rows(folder, read_series(folder / "metrics.jsonl"))
    assert [(row[0], row[3]) for row in rows] == [
        ("memory of tensors", ""),
        ("step", "-50.0 %"),
        ("forward passes", "+25.0 %"),
    ]
    page = write_report(folder).read_text()
    assert "Planned and measured" in page and ">-50.0 %</td>" in page and "1.0 GiB of the whole process" in page
    console = Console(record=True, width=500)
    final_screen("a", 3, plan=plan_words(rows), console=console)
    assert "(-50.0 %)" in console.export_text()


def test_a_report_without_a_plan_says_nothing_of_one(planned_run):
    _, folder = planned_run
    (folder / "plan.json").rename(folder / "elsewhere.json")
    try:
        assert plan_rows(folder, read_series(folder / "metrics.jsonl")) == []
    finally:
        (folder / "elsewhere.json").rename(folder / "plan.json")
