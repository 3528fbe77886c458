"""A plan's memory stands beside the measured one, where plan and run have the same layout."""

import json

import pytest

from conf.errors import EXIT_OK
from conf.load import compose
from train.metrics.jsonl import read_heads
from train.metrics.planned import planned
from train.metrics.writer import open_writer
from train.plan.run import run_plan


@pytest.fixture(scope="module")
def planned_run(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    config = compose("mode=plan", "hardware=h100", "name=a", f"runs={runs}", "log.wandb=disabled", "log.progress=false")
    assert run_plan(config) == EXIT_OK
    return config, runs / "a"


def test_every_record_has_the_prediction(planned_run):
    config, folder = planned_run
    predicted = json.loads((folder / "plan.json").read_text())["ranks"][0]["peak_bytes"]
    with open_writer(config, folder) as writer:
        writer.write({"step": 1, "memory_bytes": 5})
    assert list(read_heads(folder / "metrics.jsonl")) == [
        {"step": 1, "memory_bytes": 5, "memory_predicted_bytes": predicted}
    ]
    assert predicted > 10_000_000


@pytest.mark.parametrize(
    "other", ["parallel.dp=2 batch_size=32", "micro_batch_size=8", "precision=fp32", "model.recompute=[norm]"]
)
def test_a_plan_of_another_layout_counts_for_nothing(planned_run, other):
    _, folder = planned_run
    assert planned(compose(*other.split(), "name=a"), folder) == {}


def test_no_plan_is_no_prediction(tmp_path):
    assert planned(compose(), tmp_path) == {}
