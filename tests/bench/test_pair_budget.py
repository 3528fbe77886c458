"""The budget of a pair of passes: lines that add up to its wall."""

import pytest

from bench import pair_budget
from bench.fp8_model import ProductLoop
from bench.pair_budget import BEFORE, WAITED, WALL, budget, line_of


def test_every_kind_of_work_has_a_line():
    kinds = ("triton_grouped_dgrad_fp8", "dgrad_bf16", "triton_wgrad_fp8", "attention_backward", "permute")
    assert [line_of(kind) for kind in kinds] == list(BEFORE)[:5]


@pytest.mark.slow
def test_lines_add_up_to_the_wall(monkeypatch, capsys):
    now, _ = budget()
    for lines, nearest in ((now, 1e-9), (BEFORE, 0.5)):
        assert sum(lines.values()) - lines[WALL] == pytest.approx(lines[WALL], abs=nearest)
    assert now[WAITED] < 1 < BEFORE[WAITED]
    names = "product", "wgrad, added", "product of experts", "wgrad of experts, added"
    monkeypatch.setattr(pair_budget, "our_loops", lambda: dict.fromkeys(names, ProductLoop(128, 128, 160)))
    pair_budget.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[-1][0] == WALL and float(rows[-1][1]) == 32.2 and len(rows) == 1 + len(BEFORE)
