"""Planned times of a rank that runs alone, and the planned step of the job with measured times in place of planned
ones."""

import dataclasses

import pytest
import torch

from conf.errors import UserError
from tests.dry_run.pieces import invented, piece_of, screen_of
from train.dry_run import expected as module
from train.dry_run.dry_run_result import find
from train.dry_run.expected import expect, plan_again
from train.plan.time.step_time import plan_time

CPU = torch.device("cpu")
JOB = ["parallel.pp=2", "parallel.dp=4", "parallel.ep=4", "batch_size=32", "hardware=h100"]


@pytest.fixture
def on_h100(monkeypatch):
    """Let this device pass for the one of the description."""
    monkeypatch.setattr(module, "_is_here", lambda job, device: True)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "dualpipev"])
def test_what_is_measured_as_planned_leaves_the_job_as_planned(on_h100, schedule):
    piece = piece_of(*JOB, f"parallel.schedule={schedule}")
    times = expect(piece, CPU)
    assert times.reason == "" and times.job.step_seconds == plan_time(piece.job).step_seconds
    same = plan_again(times, times.piece.actions, times.piece.update.seconds)
    assert same == pytest.approx(times.job.step_seconds)


def test_a_rank_alone_waits_for_no_transfer(on_h100):
    piece = piece_of(*JOB)
    times = expect(piece, CPU)
    assert times.job.exchange_seconds > 0
    together = sum(times.job.length(action) for action in times.job.actions[piece.pp_rank])
    assert 0 < times.piece.schedule < together
    assert times.piece.update.gather == 0 < times.job.update.gather


def test_slower_computing_makes_a_slower_job_but_leaves_its_transfers(on_h100):
    times = expect(piece_of(*JOB), CPU)
    twice = plan_again(
        times, {kind: 2 * each for kind, each in times.piece.actions.items()}, 2 * times.piece.update.seconds
    )
    assert times.job.step_seconds < twice < 2 * times.job.step_seconds
    update = plan_again(times, times.piece.actions, 2 * times.piece.update.seconds)
    assert update - times.job.step_seconds == pytest.approx(times.whole.update.seconds)


def test_a_rank_that_was_cut_speaks_for_all_its_layers(on_h100):
    piece = piece_of(*JOB, "dry_run.rank=0", "model.layers=8")
    layers = [range(layers.start, layers.stop - 1) for layers in piece.layers]
    times = expect(dataclasses.replace(piece, layers=layers, left_out=2), CPU)
    assert times.piece.schedule < times.whole.schedule
    assert plan_again(times, times.piece.actions, times.piece.update.seconds) == pytest.approx(times.job.step_seconds)


def test_a_shrunken_rank_says_nothing_about_the_job(on_h100):
    piece = piece_of(*JOB, "dry_run.shrink=4")
    times = expect(piece, CPU)
    assert times.job is not None and times.piece is not None and times.whole is None
    found = find(piece, invented(piece), times, CPU)
    assert found.job_step == times.job.step_seconds and found.job_step_again is None
    assert "only times at full width" in screen_of(piece)


def test_times_of_another_device_are_not_put_into_the_plan():
    piece = piece_of(*JOB)
    times = expect(piece, CPU)
    assert times.job is not None and times.piece is None and times.whole is None
    assert "measured on this CPU, and hardware=h100" in screen_of(piece)


@pytest.mark.parametrize(
    "overrides, reason",
    [([], "hardware=NAME"), (["hardware=h100", "data.mask_documents=true"], "no rule for attention inside documents")],
)
def test_without_planned_times_memory_is_still_compared(overrides, reason):
    times = expect(piece_of(*overrides), CPU)
    assert times.job is None and reason in times.reason


def test_a_calibration_that_cannot_be_used_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"plan\.calibration"):
        expect(piece_of("hardware=cpu", f"plan.calibration={tmp_path / 'none.json'}"), CPU)
    with pytest.raises(UserError, match="hardware"):
        expect(piece_of(f"plan.calibration={tmp_path / 'none.json'}"), CPU)


def test_the_screen_names_a_skipped_update():
    piece = piece_of()
    assert "SKIPPED     1 update, because gradients were not finite" in screen_of(
        piece, dataclasses.replace(invented(piece), skipped=1)
    )
