"""The options that the benchmark of planned step times passes to the plan."""

import pytest

from bench.plan_time import imbalance


def test_imbalance_is_that_of_ranks_and_not_of_experts():
    load = {"layers.1": [30, 10, 5, 15], "layers.2": [10, 10, 10, 10]}
    assert imbalance(load, 1) == 1.0
    assert imbalance(load, 2) == pytest.approx((40 / 30 + 1.0) / 2)
    assert imbalance(load, 4) == pytest.approx((30 / 15 + 1.0) / 2)
