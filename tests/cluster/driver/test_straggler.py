"""Which rank is named as slow, on timings with the noise of a busy machine: no healthy rank, and a slow rank once and
soon."""

import math
import random
from collections.abc import Iterator

import pytest

from cluster.driver.straggler import BLOCK_STEPS, WINDOW_BLOCKS, SlowRank, Stragglers

WINDOW = BLOCK_STEPS * WINDOW_BLOCKS


def timings(
    seed: int, ranks: int, steps: int, *, noise: float, spikes: float = 0.05, bursts: float = 0.0
) -> Iterator[list[float]]:
    """Seconds of every rank's work, step by step.

    noise: standard deviation of its logarithm, from step to step. spikes: share of steps that take 2 to 8 times as long.
    bursts: chance that a rank begins a stretch of 3 to 30 steps in which another program takes up to two thirds of its core.
    """
    draw = random.Random(seed)
    left, slower = [0] * ranks, [1.0] * ranks
    for _ in range(steps):
        together, found = draw.lognormvariate(0, noise / 2), []
        for rank in range(ranks):
            if not left[rank] and draw.random() < bursts:
                left[rank], slower[rank] = draw.randint(3, 30), draw.uniform(1.2, 3)
            left[rank] = max(0, left[rank] - 1)
            seconds = 0.3 * together * draw.lognormvariate(0, noise) * (slower[rank] if left[rank] else 1.0)
            found.append(seconds * (draw.uniform(2, 8) if draw.random() < spikes else 1.0))
        yield found


def named(
    steps, slow: int | None = None, by: float = 1.3, stages=None, factor: float = 1.2
) -> list[tuple[int, SlowRank]]:
    """Who is named, and after how many steps; rank `slow` takes `by` times as long as the timings say."""
    rule, found = None, []
    for number, seconds in enumerate(steps, 1):
        rule = rule or Stragglers(stages or [range(len(seconds))])
        for rank, each in enumerate(seconds):
            rule.take(rank, each * (by if rank == slow else 1.0))
        found += [(number, slow_rank) for slow_rank in rule.new(factor)]
    return found


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize(
    "noise", [{"noise": 0.05}, {"noise": 0.3}, {"noise": 0.6, "spikes": 0.1}, {"noise": 0.1, "bursts": 0.003}]
)
def test_noise_names_nobody_in_thousands_of_steps(ranks, noise):
    assert named(timings(ranks, ranks, 4000, **noise)) == []


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_rank_that_takes_30_percent_more_is_named_once_and_soon(ranks):
    late = []
    for seed in range(10):
        ((after, slow),) = named(timings(seed, ranks, 4 * WINDOW, noise=0.1), slow=1)
        assert slow.rank == 1 and 1.15 < slow.seconds / slow.median < 1.45
        late.append(after)
    assert sorted(late)[5] <= WINDOW + BLOCK_STEPS and max(late) <= 2 * WINDOW, late


def test_a_rank_that_becomes_slow_recovers_and_becomes_slow_again_is_two_episodes():
    calm = [[1.0, 1.0, 1.0]] * (2 * WINDOW)
    slow = [[1.0, 1.5, 1.0]] * (3 * WINDOW)
    found = named([*calm, *slow, *calm, *slow])
    assert [each.rank for _, each in found] == [1, 1]
    assert 2 * WINDOW < found[0][0] <= 3 * WINDOW and found[1][0] > 7 * WINDOW
    assert found[0][1] == SlowRank(1, 1.5, pytest.approx(1.0))


def test_stages_that_have_more_work_are_no_stragglers():
    work = [[1.0, 1.0, 1.6, 1.6]] * (3 * WINDOW)
    assert named(work, stages=[range(2), range(2, 4)]) == []
    assert [slow.rank for _, slow in named(work, slow=3, stages=[range(2), range(2, 4)])] == [3]


def test_a_stage_of_one_rank_is_named_when_it_stands_out_from_all():
    stages = [range(1), range(1, 2), range(2, 3)]
    assert named([[1.0, 1.8, 1.0]] * (2 * WINDOW), stages=stages) == []
    assert [slow.rank for _, slow in named([[1.0, 2.5, 1.0]] * (2 * WINDOW), stages=stages)] == [1]


def test_a_rank_must_stand_out_by_twice_the_noise_of_a_block():
    """Of two ranks: the standard error of the difference between their medians, from the steps inside a block."""
    size = 0.3
    steps = [[math.exp(size * (-1) ** step)] * 2 for step in range(2 * WINDOW)]
    sigma = 1.4826 * size  # of normal noise with this median size
    limit = 2 * math.sqrt(2) * 1.2533 * sigma / math.sqrt(BLOCK_STEPS)
    assert named(steps, slow=0, by=math.exp(0.99 * limit)) == []
    assert [slow.rank for _, slow in named(steps, slow=0, by=math.exp(1.01 * limit))] == [0]


def test_a_rank_must_stand_out_from_noise_that_lasts_longer_than_a_block():
    """Of five ranks: twice the spread of all blocks around the middle rank, though no step differs inside a block."""
    size, steps = 0.15, []
    for step in range(2 * WINDOW):
        way = size * (-1) ** (step // BLOCK_STEPS)
        steps.append([1.0, 1.0, math.exp(way), math.exp(-way), math.exp(-size)])
    limit = 2 * 1.4826 * size
    assert named(steps, slow=0, by=math.exp(0.99 * limit)) == []
    assert [slow.rank for _, slow in named(steps, slow=0, by=math.exp(1.01 * limit))] == [0]


def test_what_nobody_would_notice_is_not_named_and_0_names_never():
    assert named([[0.001, 0.004]] * (2 * WINDOW)) == []
    assert named([[1.0, 4.0]] * (2 * WINDOW), factor=0.0) == []
    assert named([[1.0]] * (2 * WINDOW)) == []
