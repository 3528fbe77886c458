"""The intervals that plans show are those of the published jobs, and follow the stated rules."""

import math
from collections import Counter

import pytest

from bench import plan_published as bench
from bench.published_jobs import DEEPSEEK, PublishedJob, published_jobs
from conf.load import compose
from parallel.pipeline.orders import Action
from train.plan.time.rates import INTERVALS, OURS_UNTIMED, TUNED
from train.plan.time.step_time import plan_time


def _planned(source: str, error: float) -> bench.PlannedJob:
    return bench.PlannedJob(PublishedJob(source, "made up", (), 1.0), math.exp(error))


def test_rows_are_of_many_sources_and_kinds_and_no_layout_stands_twice_under_one_speed():
    jobs = list(published_jobs())
    assert len(jobs) == 62 and len({job.source for job in jobs}) == 14
    assert Counter(job.kind for job in jobs) == {"tuned": 33, "untuned": 22, "native": 6, "host-bound": 1}
    assert len({(job.source, job.overrides, job.tokens_per_second) for job in jobs}) == len(jobs)
    assert not any("tensor" in word for job in jobs for word in job.overrides)


def test_every_source_counts_once_and_the_middle_is_the_mean_error():
    few = [_planned("a 1", 0.3), _planned("b 1", 0.1)]
    many = [*few, *[_planned("b 1", 0.1)] * 20]
    assert bench.interval_of(many) == pytest.approx(bench.interval_of(few))
    half = 3.0777 * 0.1 * math.sqrt(2) * math.sqrt(1.5)  # Student's t of one degree of freedom
    assert bench.interval_of(few) == pytest.approx((0.2 - half, 0.2 + half), rel=1e-3)


def test_a_job_is_held_against_an_interval_that_does_not_know_its_source():
    jobs = [_planned("a 1", 0.9), _planned("b 1", 0.01), _planned("c 2", -0.01), _planned("d 2", 0.0)]
    low, high = bench.interval_of(jobs)
    assert low < 0.9 < high and bench.held_share(jobs) == pytest.approx(3 / 4)


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


@pytest.mark.slow  # all 62 plans
def test_plans_show_the_intervals_of_the_jobs():
    kinds = bench.by_interval(bench.plan_jobs())
    assert {"untuned", "native"} <= kinds.keys()
    for kind, shown in INTERVALS.items():
        jobs = kinds[kind]
        assert bench.interval_of(jobs) == pytest.approx((shown.low, shown.high), abs=0.003)
        assert (len(jobs), bench.held_share(jobs)) == (shown.jobs, pytest.approx(shown.held, abs=0.01))
        assert shown.held > 0.7
    tuned = [math.expm1(-one.error) for one in kinds[TUNED]]
    assert sum(map(abs, tuned)) / len(tuned) < 0.1
    assert INTERVALS[TUNED].high - INTERVALS[TUNED].low < INTERVALS[OURS_UNTIMED].high - INTERVALS[OURS_UNTIMED].low
