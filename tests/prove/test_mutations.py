"""A proof must be able to fail: it finds the bugs of tests/prove/mutations, and points to the right phase and part."""

import re

import pytest

from bench.prove_rows import rotated
from conf.schema import ROOT
from tests.prove.mutants import UNTOUCHED, Outcome, outcomes
from tests.prove.mutations import AREAS, MUTATIONS
from tests.prove.mutations.generated import draw, drawn_by_name
from tests.prove.mutations.recipes import RECIPES
from tests.prove.mutations.registry import OURS

SHARE = 36
"""One in so many is proven in a run of the tests, other ones at every commit."""
RIGHT_PHASE, RIGHT_PART = 0.9, 0.8
"""Share of a sample whose certificates name the right phase and part, at least."""


def proven(names, folder) -> list[Outcome]:
    found = list(outcomes(names, folder))
    assert {one.mutation.name: one.problem for one in found if one.problem} == {}
    return found


def test_every_area_has_its_share():
    counts = {area: sum(one.area == area for one in MUTATIONS.values()) for area in AREAS}
    assert len(MUTATIONS) >= 150
    least = {"fp8": 18, "formats": 7, "high": 6, "wire": 10, "context": 15, "skips": 10, "resumes": 10, "sizes": 12}
    assert {area: counts[area] for area in counts if counts[area] < least.get(area, 10)} == {}


def test_each_says_who_had_it_what_runs_it_and_where_it_should_be_seen():
    for mutation in MUTATIONS.values():
        assert re.match(rf"{OURS}: |.*\w+/[\w.-]+#\d+", mutation.had), mutation
        assert mutation.recipe in RECIPES and mutation.phases and re.compile(mutation.part)
    assert set(RECIPES) == {mutation.recipe for mutation in MUTATIONS.values()}


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_finds_what_it_patches(name):
    assert MUTATIONS[name].places()


@pytest.mark.slow
def test_the_product_as_it_is_has_no_difference_in_these_recipes(tmp_path):
    found = proven(rotated(UNTOUCHED, 9), tmp_path)
    assert {one.mutation.name: one.first.text() for one in found if one.first is not None} == {}


@pytest.mark.slow
def test_some_mutations_are_found(tmp_path):
    """`python -m bench.prove --mutations` takes all."""
    found = proven([*rotated(MUTATIONS, SHARE)], tmp_path)
    assert [one.mutation.name for one in found if one.first is None] == []
    told = [(one.mutation, one.first) for one in found]
    assert sum(mutation.phase_is_right(first) for mutation, first in told) >= RIGHT_PHASE * len(told)
    assert sum(mutation.part_is_right(first) for mutation, first in told) >= RIGHT_PART * len(told)


def test_the_page_has_every_area_and_counts_its_bugs():
    page = (ROOT / "bench/RESULTS.md").read_text()
    rows = dict(re.findall(r"^\| ([a-z0-9]+) \| (\d+) \|", page, re.MULTILINE))
    assert {area: int(rows.get(area, 0)) for area in AREAS} == {
        area: sum(one.area == area for one in MUTATIONS.values()) for area in AREAS
    }


def test_generated_bugs_are_the_same_for_a_seed_and_find_what_they_change():
    names = draw(20, seed=1)
    assert [drawn_by_name(name).had for name in names] == [drawn_by_name(name).had for name in draw(20, seed=1)]
    assert all(drawn_by_name(name).places() for name in names)
