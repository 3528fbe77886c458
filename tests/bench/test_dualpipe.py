"""DualPipe's order: complete, and as idle as the paper says."""

from collections import Counter

import pytest

from bench.dualpipe import dualpipe_actions
from parallel.pipeline.simulate import simulate


@pytest.mark.parametrize("pp", [2, 4, 8, 16])
def test_idle_time_is_table_2s_and_every_pass_runs_once(pp):
    forward, weights, pair = 10.0, 7.0, 24.0
    seconds = {"F": forward, "I": forward, "W": weights, "B": forward + weights, "FB": pair}
    lines = dualpipe_actions(pp, 4 * pp)
    result = simulate(lines, lambda action: seconds[action.kind])
    idle = max(result.makespan - busy for busy in result.busy)
    assert idle == pytest.approx((pp / 2 - 1) * (pair + forward + weights - 3 * weights))
    for rank, line in enumerate(lines):
        done = Counter(part[:3] for action in line for part in action.halves or (action,))
        mine = [(rank, m) for m in range(0, 4 * pp, 2)] + [(pp - 1 - rank, m) for m in range(1, 4 * pp, 2)]
        for where in mine:
            assert done["F", *where] == 1 == done["B", *where] + done["I", *where]
            assert done["I", *where] == done["W", *where]
        assert sum(done.values()) == 2 * len(mine) + sum(kind == "W" for kind, *_ in done)
