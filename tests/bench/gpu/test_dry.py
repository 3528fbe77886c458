"""The dry check as a user runs it, and how its parts judge wrong figures."""

import json
import subprocess
import sys

import jsonschema
import pytest
import torch

from bench.gpu import cards, curve, memory, ranks, steps
from bench.gpu.machine import Machine
from conf.load import compose
from conf.schema import ROOT
from tests.bench.gpu.test_run import SCHEMA
from train.loop.layout_check import check_layout
from train.plan.job import with_nodes


@pytest.mark.slow
def test_the_dry_check_passes_on_a_cpu_and_says_what_it_is(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--part", "environment", "kernels"]
    done = subprocess.run([*command, "--out", tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing of this ran on a GPU" in done.stdout
    record = json.loads((tmp_path / "gpu.json").read_text())
    jsonschema.validate(record, SCHEMA)
    assert record["counts"]["fail"] == 0 and record["counts"]["pass"] > 20 and not record["on_gpu"]
    lines = {line["name"]: line for part in record["parts"] for line in part["lines"]}
    assert lines["bf16 experts"]["figures"]["tensors"] == 5
    assert all(str(ROOT) not in json.dumps(line) for line in lines.values())


@pytest.mark.slow
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "MoE"])
def test_a_layer_agrees_with_itself_and_a_wrong_gradient_is_seen(dense, monkeypatch):
    monkeypatch.setattr(steps, "SHRINK", 64)
    machine = Machine(torch.device("cpu"))
    found = steps.layer_step(machine, "bf16", dense)
    assert found.problem is None and found.figures["tensors"] > 20
    results, calls = steps.results, []

    def wrong(layer):
        sides = results(layer)
        calls.append(layer)
        if len(calls) == 1:  # the device's side
            sides["d layers.0.attention.out.weight" if dense else "d layers.3.moe.router.weight"] *= 2
        return sides

    monkeypatch.setattr(steps, "results", wrong)
    assert ".weight" in steps.layer_step(machine, "bf16", dense).problem


@pytest.mark.slow
def test_ranks_whose_tensors_pass_through_the_host_give_the_losses_of_one():
    found = ranks.layout(Machine(torch.device("cpu")), *ranks.SMALL_LAYOUTS["ep 2"])
    assert found.problem is None and len(found.table) == 1 + ranks.STEPS


@pytest.mark.slow
def test_links_and_layouts_of_two_ranks_are_those_that_cards_would_run():
    machine = Machine(torch.device("cpu"))
    found = cards.links(machine)
    assert {row[0] for row in found.table[1:]} == {"inside", "all-reduce", "all-to-all"} and found.figures == {
        "cards": 2
    }
    assert cards.together(machine, cards.LAYOUTS["pp 2"]).problem is None


@pytest.mark.parametrize(
    "overrides",
    [
        *(("mode=dry_run", *overrides) for overrides in memory.CASES.values()),
        *((*ranks.MODEL, f"precision={precision}", *layout) for _, precision, layout in ranks.LAYOUTS.values()),
        *((*ranks.MODEL, "precision=bf16", *layout) for layout in cards.LAYOUTS.values()),
        ("conf=tiny", *curve.SIZE),
    ],
    ids=[*memory.CASES, *ranks.LAYOUTS, *cards.LAYOUTS, "curve"],
)
def test_what_runs_on_a_gpu_alone_is_a_recipe_and_a_layout_that_can_run(overrides):
    config = with_nodes(compose(*overrides))
    check_layout(config)
    assert config.batch_size % (config.parallel.dp * config.micro_batch_size) == 0


def test_curves_that_part_do_not_learn_or_are_cut_short_fail():
    cpu = [8.0 - 0.06 * step for step in range(60)]
    assert curve.beside([1.0005 * loss for loss in cpu], cpu, 60, 1e-3, True).problem is None
    assert "first losses" in curve.beside([1.01 * cpu[0], *cpu[1:]], cpu, 60, 1e-3, True).problem
    drift = [loss * (1 + 0.001 * step) for step, loss in enumerate(cpu)]
    assert "smoothed losses" in curve.beside(drift, cpu, 60, 1e-3, True).problem
    assert "the loss went from" in curve.beside([8.0] * 60, [8.0] * 60, 60, 1e-3, True).problem
    assert "59 of 60" in curve.beside(cpu[:59], cpu, 60, 1e-3, True).problem
    assert curve.beside([float("nan")] * 60, cpu, 60, 1e-3, True).problem


def record(peak: float = 1.0, master: float = 1.0) -> dict:
    size = 10 * 2**30
    one = {"measured": size, "planned": size}
    return {
        "peak_bytes": {"measured": size, "planned": peak * size}, "phase_peak_bytes": {"update": one}, "layers_left_out": 0,
        "item_bytes": {"weights": one, "master": {"measured": size, "planned": master * size}, "rest": {"measured": 1, "planned": 9}},
        "shrink": 1, "phase_seconds": {"step": {"measured": 1.0, "planned": None}},
    }  # fmt: skip


def test_a_plan_that_is_off_at_its_peak_or_in_what_is_held_fails():
    assert memory.judge(record()).problem is None
    assert memory.judge(record(peak=1.05)).problem is None
    assert memory.judge(record(peak=0.85)).problem == "peak: the plan is off by -15.0%"
    assert memory.judge(record(master=1.1)).problem == "master: the plan is off by +10.0%"
