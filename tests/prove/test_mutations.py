"""A proof has to be able to fail: it finds every bug of mutations.py, and points to the right phase or layer in most of them."""

import pytest

from bench.prove_rows import rotated
from conf.schema import ROOT
from tests.prove.mutants import UNTOUCHED, first_differences
from tests.prove.mutations import MUTATIONS

RIGHT = 0.8
"""Share of bugs whose certificate points to the right phase or layer, at least."""


def assert_found(names: list[str], folder) -> None:
    found = first_differences(names, folder)
    assert [name for name, first in found.items() if first is None] == []
    met = {
        name: MUTATIONS[name].phase_is_right(first) or MUTATIONS[name].layer_is_right(first)
        for name, first in found.items()
    }
    assert sum(met.values()) >= RIGHT * len(met), {name: found[name].text() for name, ok in met.items() if not ok}


def test_there_are_enough_of_them_and_each_says_who_had_it():
    assert len(MUTATIONS) >= 25
    assert all("#" in mutation.had and mutation.layout and mutation.phases for mutation in MUTATIONS.values())


def test_each_finds_what_it_patches(monkeypatch):
    for mutation in MUTATIONS.values():
        with monkeypatch.context() as patch:
            mutation.apply(patch)


@pytest.mark.slow
def test_the_product_as_it_is_has_no_difference_in_these_layouts(tmp_path):
    found = first_differences(UNTOUCHED, tmp_path)
    assert {name: first.text() for name, first in found.items() if first is not None} == {}


@pytest.mark.slow
def test_some_mutations_are_found(tmp_path):
    """Other ones at every commit; `python -m bench.prove --mutations` takes all."""
    assert_found([*rotated(MUTATIONS, 5)], tmp_path)


def test_the_page_has_every_mutation():
    page = (ROOT / "train/docs/prove.md").read_text()
    assert [name for name in MUTATIONS if f"| {name.replace('_', ' ')} |" not in page] == []
    assert f"All {len(MUTATIONS)} were found" in page
