"""Layers to stages against brute force, and where stages live."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import UserError
from conf.pipeline_schedules import SCHEDULES, check_split
from parallel.pipeline.split import split_as_given, split_layers, split_layers_evenly


def stage_placement(name: str, *sizes: int) -> list[list[int]]:
    return SCHEDULES[name].place_stages(*sizes)


PLACEMENTS = [
    *(("1f1b", pp) for pp in (1, 2, 3)),
    *(("interleaved", 2, virtual) for virtual in (2, 3, 4)),
    *(("zbv", pp) for pp in (1, 2)),
    ("dualpipev", 3),
]


def rank_costs(costs, first, last, bounds, placement):
    stages = [sum(costs[a:b]) for a, b in itertools.pairwise(bounds)]
    stages[0] += first
    stages[-1] += last
    return [sum(stages[stage] for stage in own) for own in placement]


def every_split(layers: int, stages: int):
    """Bounds of all splits whose inner stages have layers."""
    for cut in itertools.combinations_with_replacement(range(layers + 1), stages - 1):
        if len(set(cut)) == len(cut):
            yield [0, *cut, layers]


def split_and_best(placement, costs, first, last) -> tuple[float, float]:
    """Largest cost of a rank, and the smallest possible."""
    stages = sum(map(len, placement))
    ranges = split_layers(costs, first, last, placement)
    assert [i for r in ranges for i in r] == list(range(len(costs))) and all(len(r) for r in ranges[1:-1])
    every = (rank_costs(costs, first, last, bounds, placement) for bounds in every_split(len(costs), stages))
    bounds = [0, *(r.stop for r in ranges)]
    return max(rank_costs(costs, first, last, bounds, placement)), min(map(max, every))


@settings(deadline=None)
@given(st.sampled_from(PLACEMENTS), st.integers(0, 3), st.integers(0, 9), st.integers(0, 9))
def test_no_better_split_of_equal_layers_exists(layout, more, first, last):
    placement = stage_placement(*layout)
    layers = max(1, sum(map(len, placement)) - 2) + more
    got, best = split_and_best(placement, [2] * layers, first, last)
    assert got == best


@settings(deadline=None)
@given(st.sampled_from(PLACEMENTS), st.integers(0, 3), st.integers(1, 3), st.integers(0, 9))
def test_cheap_first_layers_cost_one_of_them_at_most(layout, more, cheap, last):
    placement = stage_placement(*layout)
    layers = max(1, sum(map(len, placement)) - 2) + more
    cheap = min(cheap, layers)
    got, best = split_and_best(placement, [1] * cheap + [2] * (layers - cheap), 0, last)
    assert best <= got <= best + 1


def test_deepseek_v3_shape():
    """61 layers, 3 of them dense, head and MTP at the end as heavy as 4.3 layers: no rank has more than these."""
    costs = [0.4] * 3 + [1.0] * 58
    for name, pp in (("1f1b", 16), ("dualpipev", 16)):
        placement = stage_placement(name, pp)
        bounds = [0, *(r.stop for r in split_layers(costs, 0.0, 4.3, placement))]
        assert max(rank_costs(costs, 0.0, 4.3, bounds, placement)) < 4.45
    assert [len(r) for r in split_layers([1.0] * 5, 0, 0, [[0], [1]])] == [2, 3]  # ties leave early stages short


def test_placement():
    assert stage_placement("1f1b", 3) == [[0], [1], [2]]
    assert stage_placement("interleaved", 3) == [[0, 3], [1, 4], [2, 5]]
    assert stage_placement("interleaved", 2, 4) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert stage_placement("zbv", 3) == stage_placement("dualpipev", 3) == [[0, 5], [1, 4], [2, 3]]


def test_an_even_split_and_one_by_hand():
    assert [len(one) for one in split_layers_evenly(7, 4)] == [1, 2, 2, 2]
    assert [len(one) for one in split_layers_evenly(2, 4)] == [0, 1, 1, 0]
    assert split_as_given([0, 2, 1]) == [range(0), range(2), range(2, 3)]


@pytest.mark.parametrize(
    ("lengths", "rule"),
    [([2, 2, 2], "has 4"), ([2, 2, 2, 1], "has 7 layers in all"), ([4, 0, 3, 1], "leaves stage 1 without")],
)
def test_a_split_that_does_not_fit_is_named(lengths, rule):
    with pytest.raises(UserError, match=rule) as caught:
        check_split(lengths, "zbv", 2, 8)
    assert caught.value.field == "parallel.split"
    check_split([0, 4, 4, 0], "zbv", 2, 8)
