"""A step out of its history is done again before the update: who computed it wrong is named, and the training goes on as if nothing had been."""

from types import SimpleNamespace

import pytest
import torch

from cluster.incident import newest_incident
from conf.errors import UserError
from conf.load import compose
from parallel.mesh import Layout
from parallel.shard import Shard
from tests.layouts import run_layout
from tests.small import trajectory
from train.loop.pass_repeats import LEAST_STEPS, RankDifference, UsualRange, first_difference
from train.loop.pass_watch import Sighting
from train.loop.replicas import StateChanged, StateCheck

ATTENTION, BLOCK = (Sighting(2, place, f"the output of layers.2{part}") for place, part in ((3, ".attention"), (9, "")))
WATCHED = ["cluster.deterministic=true", "steps=20", "checkpoint.every=0", "log.report_every=0"]
CHECKS = [
    "log.repeat_above=10",
    "log.state_every=1",
    "callbacks=[{_target_: bench.fault_hooks.Saboteur, faults: {3: spike_output_gradient}}]",
]


@pytest.mark.slow
def test_a_wrong_gradient_is_named_and_the_losses_are_those_of_a_run_without_it(tmp_path):
    layout = "parallel.pp=2", "parallel.dp=2", "parallel.zero=1", "parallel.schedule=1f1b"
    run_layout(tmp_path, "plain", 4, *WATCHED, *layout)
    run_layout(tmp_path, "struck", 4, *WATCHED, *layout, *CHECKS)
    _, incident = newest_incident(tmp_path / "runs" / "struck" / "logs")
    assert (incident["fault"], incident["ranks"]) == ("flipped", [3])
    assert "step 19: gradient norm" in incident["text"] and "backward pass, the gradient of" in incident["text"]
    assert trajectory(tmp_path, "struck") == trajectory(tmp_path, "plain")


def test_where_it_began_comes_first_and_experts_of_other_ranks_are_not_let_off():
    alone, experts = Layout(dp=2), Layout(dp=2, ep=2)
    late = RankDifference(1, backward=BLOCK, weights=["layers.2.w"], sums=True)
    found = first_difference([RankDifference(0, ATTENTION, BLOCK), late], alone, ["layers.2"])
    assert (found.ranks, found.phase, found.where) == ((0,), "forward pass", ATTENTION.name)
    found = first_difference([RankDifference(0, BLOCK), late], experts, ["layers.2"])
    assert found.ranks == (0, 1) and found.text.startswith("one of ranks 0 and 1, forward pass")
    found = first_difference([RankDifference(0, backward=ATTENTION), late], alone, ["layers.2"])
    assert (found.ranks, found.where) == ((1,), f"the gradient of {BLOCK.name}")
    found = first_difference([RankDifference(0), RankDifference(1, reduced=["w"])], alone, [])
    assert (found.ranks, found.phase) == ((1,), "reduction of the gradients")
    assert first_difference([RankDifference(0), RankDifference(1)], alone, []) is None


def test_a_value_is_out_of_its_history_by_the_usual_spread():
    usual = UsualRange(10, lambda middle: 0.01 * middle)
    for step in range(LEAST_STEPS):
        assert usual.spreads_above(1e9) is None, "too early to know"
        usual.take(4.0 + 0.1 * (step % 2))
    assert usual.spreads_above(4.5) is None and usual.spreads_above(0.0) is None
    assert usual.spreads_above(6.0) > 10


def test_a_bit_that_changes_behind_an_update_is_named_before_it_is_read():
    shards = {
        name: Shard(torch.randn(30).to(dtype), 0, (30,))
        for name, dtype in (("master.a", torch.float32), ("exp_avg.a", torch.bfloat16))
    }
    check = StateCheck(2, SimpleNamespace(shards=lambda copies: shards), 3)
    check.note(4)
    check.require_unchanged()
    shards["exp_avg.a"].local.view(torch.int16)[29] ^= 1
    with pytest.raises(StateChanged, match=r"rank 3: exp_avg.a changed behind the update of step 4") as error:
        check.require_unchanged()
    assert error.value.ranks == (3,)
    check.note(5)
    check.require_unchanged()


def test_passes_that_need_not_repeat_are_refused():
    with pytest.raises(UserError, match=r"add cluster\.deterministic=true"):
        compose("log.repeat_above=10")
