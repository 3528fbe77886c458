"""Layers to stages against brute force, and where stages live."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import UserError
from parallel.pipeline.split import split_layers, stage_placement


def _stage_costs(costs, first, last, bounds):
    stages = [sum(costs[a:b]) for a, b in itertools.pairwise(bounds)]
    stages[0] += first
    stages[-1] += last
    return stages


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 9), st.integers(0, 9), st.integers(1, 8))
def test_split_is_the_best_of_all(costs, first, last, stages):
    stages = min(stages, len(costs))
    cuts = itertools.combinations(range(1, len(costs)), stages - 1)
    every = [_stage_costs(costs, first, last, [0, *cut, len(costs)]) for cut in cuts]
    best = min((max(c), sum(x * x for x in c)) for c in every)
    ranges = split_layers(costs, first, last, stages)
    assert [i for r in ranges for i in r] == list(range(len(costs))) and all(len(r) for r in ranges)
    got = _stage_costs(costs, first, last, [0] + [r.stop for r in ranges])
    assert (max(got), sum(x * x for x in got)) == best


def test_deepseek_v3_shape():
    """61 layers, 3 of them dense, head and MTP at the end: 32 stages, ties leave early stages short."""
    ranges = split_layers([0.9] * 3 + [1.0] * 58, 0.0, 2.0, 32)
    sizes = [len(r) for r in ranges]
    assert sum(sizes) == 61 and max(sizes) == 2 and sizes[-1] == 1
    assert [len(r) for r in split_layers([1.0] * 5, 0, 0, 2)] == [2, 3]


def test_impossible_split_names_the_cure():
    with pytest.raises(UserError, match=r"9 stages for 8 layers(.|\n)*cure: use parallel.pp"):
        split_layers([1.0] * 8, 0, 0, 9)


def test_placement():
    assert stage_placement("1f1b", 3) == [[0], [1], [2]]
    assert stage_placement("interleaved", 3) == [[0, 3], [1, 4], [2, 5]]
    assert stage_placement("zbv", 3) == stage_placement("dualpipev", 3) == [[0, 5], [1, 4], [2, 3]]
