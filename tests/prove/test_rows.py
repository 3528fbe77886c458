"""The rows of `python -m bench.prove`: every three settings meet that may, and a tenth of the rows is proven here."""

import itertools

import pytest

from bench.prove import prove_rows
from bench.prove_rows import ROWS, SPREAD, SWITCHES, allowed_spreads, read_rows, rotated, to_config


@pytest.fixture(scope="module")
def rows():
    return read_rows()


def test_every_row_passes_the_rules(rows):
    assert len(rows) == ROWS and len({tuple(row.values()) for row in rows}) == ROWS
    for row in rows:
        assert row.keys() == SWITCHES.keys() and all(row[key] in SWITCHES[key] for key in row)
        to_config(row)


def test_every_three_settings_meet_that_the_rules_allow_together(rows):
    allowed = allowed_spreads()
    for keys in itertools.combinations(SWITCHES, 3):
        met = {tuple(row[key] for key in keys) for row in rows}
        places = [(place, SPREAD.index(key)) for place, key in enumerate(keys) if key in SPREAD]
        possible = {tuple(values[there] for _, there in places) for values in allowed}
        for values in itertools.product(*(SWITCHES[key] for key in keys)):
            if tuple(values[here] for here, _ in places) in possible:
                assert values in met, dict(zip(keys, values, strict=True))


def test_a_tenth_rotates(rows):
    numbered = dict(enumerate(rows))
    tenth = rotated(numbered)
    assert len(tenth) == ROWS // 10 and all(rows[number] is row for number, row in tenth.items())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_tenth_of_the_rows_holds(rows, tmp_path):
    results = list(prove_rows(rotated(dict(enumerate(rows))), tmp_path))
    assert len(results) == ROWS // 10
    assert {result.number: result.first for result in results if result.first} == {}
    assert all(verdict.compared for result in results for verdict in result.verdicts)
