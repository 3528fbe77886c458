"""The rows of `python -m bench.prove`: every allowed combination of three settings occurs, and some of the rows run as
tests."""

import itertools
from functools import cache

import pytest

from bench.prove import prove_rows
from bench.prove_rows import (
    COLUMNS,
    JOINED,
    MUON_JOINED,
    MUON_MEETS,
    MUON_SWITCHES,
    ROWS,
    SWITCHES,
    ProveRow,
    allowed,
    read_rows,
    rotated,
    to_config,
)  # fmt: skip

SHARE = 40
"""One in so many is proven in a run of the tests, other ones at every commit; `python -m bench.prove` takes all."""


@pytest.fixture(scope="module")
def rows():
    return read_rows()


@pytest.mark.slow
def test_every_row_passes_the_rules(rows):
    assert len({tuple(row.values()) for row in rows}) == len(rows) > ROWS
    for number, row in enumerate(rows):
        assert row.keys() == COLUMNS.keys() and all(row[key] in COLUMNS[key] for key in row)
        assert row["optim.name"] == ("adamw" if number < ROWS else "muon")
        to_config(row)


@pytest.mark.slow
def test_every_three_settings_meet_that_the_rules_allow_together(rows):
    for keys in itertools.combinations(SWITCHES, 3):
        met = {tuple(row[key] for key in keys) for row in rows[:ROWS]}
        for values in itertools.product(*(SWITCHES[key] for key in keys)):
            given = dict(zip(keys, values, strict=True))
            if all(_allowed_together(given, joined) for joined in JOINED):
                assert values in met, given


@pytest.mark.slow
def test_every_two_settings_meet_muon_that_the_rules_allow_together(rows):
    for keys in itertools.combinations((*MUON_MEETS, *list(MUON_SWITCHES)[1:]), 2):
        met = {tuple(row[key] for key in keys) for row in rows[ROWS:]}
        for values in itertools.product(*(COLUMNS[key] for key in keys)):
            given = dict(zip(keys, values, strict=True))
            if all(_allowed_together(given, joined) for joined in MUON_JOINED):
                assert values in met, given


def _allowed_together(given: ProveRow, joined: tuple[str, ...]) -> bool:
    places = tuple(place for place, key in enumerate(joined) if key in given)
    return tuple(given[joined[place]] for place in places) in _parts(joined, places)


@cache
def _parts(joined: tuple[str, ...], places: tuple[int, ...]) -> set[tuple]:
    return {tuple(values[place] for place in places) for values in allowed(joined)}


def test_a_tenth_rotates(rows):
    numbered = dict(enumerate(rows))
    tenth = rotated(numbered)
    assert len(tenth) == -(-len(rows) // 10) and all(rows[number] is row for number, row in tenth.items())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_some_rows_hold(rows, tmp_path):
    results = list(prove_rows(rotated(dict(enumerate(rows)), SHARE), tmp_path))
    assert len(results) in (len(rows) // SHARE, len(rows) // SHARE + 1)
    assert {result.number: result.first for result in results if result.first} == {}
    assert all(verdict.compared for result in results for verdict in result.verdicts)
