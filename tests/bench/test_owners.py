"""Owners of matrices in models as large as those that were trained with Muon: the work is even, the traffic is small,
and the plan agrees."""

import pytest

from bench.owners import count_owners, whole_weights
from conf.load import compose


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [8, 32])
@pytest.mark.parametrize("recipe, layers", [("deepseek_v3", 2), ("moonlight_16b", 26), ("kimi_k2", 2)])
def test_owners_share_the_work_and_send_little(recipe, layers, ranks):
    """At most 1.2 of the larger of the mean and the dearest matrix, and 1.25 of the bytes of AdamW under ZeRO 1; a plan bounds both."""
    config = compose(f"conf={recipe}", "data.path=none", "optim=muon")
    weights, planned = whole_weights(config, layers)
    counted = count_owners(config, weights, ranks)
    assert planned.elements == counted.elements and planned.flops == pytest.approx(ranks * counted.mean)
    assert 1 <= counted.work <= 1.2
    assert counted.busiest <= planned.busiest(ranks) * (1 + 1e-9) <= 1.1 * counted.busiest
    assert 1 < counted.traffic <= 1.25
    assert counted.moved * 8 <= ranks * planned.moved(ranks)
