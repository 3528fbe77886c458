"""Schedules against the paper's values (4.2) at chosen token counts."""

import pytest

from conf.load import compose
from conf.schema import Phase, Shape
from train.optim.schedules import Schedules, value_at


@pytest.fixture(scope="module")
def v3():
    return Schedules(compose("conf=deepseek_v3", "data.path=/somewhere"))


def plan_at(schedules, tokens):
    samples = tokens / 4096
    low, high = 0, len(schedules.batch_sizes) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if schedules.samples[middle + 1] < samples else (low, middle)
    return schedules.plan(low + 1)


def test_v3_run_is_14_8_trillion_tokens(v3):
    assert v3.samples[-1] * 4096 == pytest.approx(14.8e12, rel=1e-4)
    assert v3.samples[11766] * 4096 == pytest.approx(469e9, rel=1e-2)


@pytest.mark.parametrize(
    ("tokens", "lr", "mtp", "speed"),
    [
        (1e12, 2.2e-4, 0.3, 0.001),
        (9.9e12, 2.2e-4, 0.3, 0.001),
        (12.15e12, (2.2e-4 + 2.2e-5) / 2, 0.1, 0.001),
        (14.29e12, 2.2e-5, 0.1, 0.001),
        (14.5e12, 2.2e-5, 0.1, 0.0),
        (14.7e12, 7.3e-6, 0.1, 0.0),
    ],
)
def test_v3_values(v3, tokens, lr, mtp, speed):
    plan = plan_at(v3, tokens)
    assert plan.lr == pytest.approx(lr, rel=1e-2)
    assert (plan.mtp_weight, plan.bias_speed) == (mtp, speed)


def test_v3_warmup_and_batch_ramp(v3):
    assert v3.plan(1).batch_size == 4096 and v3.plan(20000).batch_size == 15360
    assert v3.plan(1000).lr == pytest.approx(1.1e-4)
    sizes = v3.batch_sizes
    assert sizes == sorted(sizes) and all(size % 128 == 0 for size in sizes)


def test_samples_follow_one_another():
    schedules = Schedules(
        compose(
            "steps=5",
            "optim.batch_ramp_start=16",
            "optim.batch_ramp_steps=3",
            "optim.batch_ramp_increment=16",
            "batch_size=64",
        )
    )
    plans = [schedules.plan(step) for step in range(1, 6)]
    assert [plan.batch_size for plan in plans] == [16, 32, 48, 64, 64]
    assert [plan.first_sample for plan in plans] == [0, 16, 48, 96, 160]


def test_shapes():
    phases = [Phase(0.5, 2.0), Phase(0.75, 1.0, Shape.linear), Phase(1.0, 0.0, Shape.cosine)]
    assert value_at(phases, 0.5) == 2.0
    assert value_at(phases, 0.625) == pytest.approx(1.5)
    assert value_at(phases, 0.875) == pytest.approx(0.5)
    assert value_at(phases, 1.0) == pytest.approx(0.0)


def test_a_value_holds_to_the_end_of_its_phase_and_a_step_counts_by_its_middle():
    phases = [Phase(0.5, 1.0), Phase(1.0, 0.1)]
    line = [Phase(0.5, 2.0, Shape.linear), Phase(1.0, 4.0, Shape.linear)]
    assert [value_at(line, fraction) for fraction in (0.0, 0.25, 0.75)] == [2.0, 2.0, 3.0], (
        "the first begins at its value"
    )
    assert [value_at(phases, fraction) for fraction in (0.5, 0.5 + 1e-9, 1.0)] == [1.0, 0.1, 0.1]
    words = (
        "steps=4",
        "optim.warmup_steps=0",
        "optim.lr=1",
        "optim.lr_schedule=[{until: 1.0, value: 0.0, shape: linear}]",
    )
    constant = Schedules(
        compose(*words, "optim.lr_schedule=[{until: 0.25, value: 1.0}, {until: 1.0, value: 0.0, shape: linear}]")
    )
    assert [constant.plan(step).lr for step in range(1, 5)] == pytest.approx([1.0, 1 - 1 / 6, 0.5, 1 / 6])
    one = Schedules(
        compose(*words[1:], "steps=1", "optim.lr_schedule=[{until: 0.5, value: 1.0}, {until: 1.0, value: 0.0}]")
    )
    assert one.plan(1).lr == 1.0, "a run of one step is in the middle of its schedule"


def test_samples_of_an_earlier_part_of_the_run_are_passed_over():
    """Also where its batches were others than this schedule has."""
    schedules = Schedules(compose("steps=4", "batch_size=8"))
    assert [schedules.plan(step).first_sample for step in (1, 2, 4)] == [0, 8, 24]
    assert [schedules.plan(step, shift=5).first_sample for step in (1, 2, 4)] == [5, 13, 29]
