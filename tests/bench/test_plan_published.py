"""The interval that plans show is the one of the published jobs, and its rules."""

import math

import pytest

from bench import plan_published as bench
from bench.published_jobs import DEEPSEEK, PublishedJob, published_jobs
from conf.load import compose
from parallel.pipeline.orders import Action
from train.plan.time.step_time import plan_time


def _planned(source: str, error: float, group=("Hopper", "FP8")) -> bench.PlannedJob:
    return bench.PlannedJob(PublishedJob(source, "made up", (), 1.0), group, math.exp(error))


def test_rows_are_of_many_sources_and_no_layout_stands_twice_under_one_speed():
    jobs = list(published_jobs())
    assert len(jobs) == 53 and len({job.source for job in jobs}) == 8
    assert {job.laboratory for job in jobs} == {
        "DeepSeek HAI-LLM", "NVIDIA Megatron-Bridge", "NVIDIA Automodel", "Moore Threads SimuMax",
    }  # fmt: skip
    assert len({(job.source, job.overrides, job.tokens_per_second) for job in jobs}) == len(jobs)
    assert not any("tensor" in word for job in jobs for word in job.overrides)


def test_every_source_counts_once():
    few = [_planned("a 1", 0.1), _planned("b 1", -0.1)]
    many = [*few, *[_planned("b 1", -0.1)] * 20]
    assert bench.spread_of(many) == pytest.approx(bench.spread_of(few))
    assert bench.spread_of(few) == pytest.approx(1.8856 * 0.1, rel=1e-3)  # Student's t of two: 1.886


def test_a_job_is_held_against_an_interval_that_does_not_know_its_source():
    jobs = [_planned("a 1", 0.5), _planned("b 1", 0.01), _planned("b 2", -0.01)]
    left = bench.leave_out(jobs, lambda job: job.source)
    assert left.coverage == pytest.approx(2 / 3) and left.half_width > 0.3
    assert bench.leave_out(jobs, lambda job: job.laboratory).coverage == pytest.approx(2 / 3)


def test_a_factor_is_fitted_to_other_sources_of_the_same_kind():
    jobs = [_planned("a 1", 0.2), _planned("b 1", 0.2), _planned("c 1", 0.0, ("Blackwell", "FP8"))]
    each = abs(math.expm1(0.2 / 2 - 0.2))
    assert bench.fitted_error(jobs, lambda job: job.source) == pytest.approx(2 / 3 * each)


def test_a_whole_backward_counts_as_inputs_and_weights():
    lines = [[Action("F", 1, 0), Action("B", 1, 0)], [Action("I", 0, 0), Action("W", 0, 0)]]
    seconds = {"F": 1.0, "B": 5.0, "I": 4.0, "W": 2.0}
    assert bench.seconds_by_kind(lines, lambda action: seconds[action.kind]) == {"F": 0.5, "I": 3.5, "W": 2.0}


@pytest.mark.slow  # a plan of 16 ranks
def test_deepseeks_job_is_near_in_all_parts_in_its_own_order():
    config = compose(*DEEPSEEK)
    found = bench.figures(config, bench.in_dualpipe(config, plan_time(config)))
    assert found["step (s)"] == pytest.approx(bench.PUBLISHED["step (s)"], rel=0.1)
    for part, published in list(bench.PUBLISHED.items())[1:7]:
        assert found[part] == pytest.approx(published, rel=0.35 if part == "bubble (s)" else 0.3), part


@pytest.mark.slow  # all 53 plans
def test_plans_show_the_interval_of_the_jobs(published_plans):
    jobs = published_plans
    errors = [math.expm1(-one.error) for one in jobs]
    assert sum(map(abs, errors)) / len(errors) < 0.14 and abs(sum(errors) / len(errors)) < 0.04
    assert bench.spread_of(jobs) == pytest.approx(bench.PUBLISHED_SPREAD, abs=0.003)
    left = bench.leave_out(jobs, lambda job: job.source)
    assert 0.715 < left.coverage < 0.88 and left.half_width <= 0.20


@pytest.fixture(scope="module")
def published_plans():
    return bench.plan_jobs()
