"""A user's own loss term on chats: its mean is over the learnt tokens of the step, in every layout."""

import pytest
import torch

from tests.engine.scenario import LAYOUTS, Played, play, policy_batch, share, worst_difference

TERM = "optim.extra_loss={_target_: tests.engine.test_extra_loss.squared}"


def squared(outputs):
    """The mean square of the states at learnt tokens."""
    return outputs.mean(outputs.hidden_BTD.float().square().mean(-1))


def step(played: Played) -> None:
    batch = share(played.config, policy_batch(played.config), played.rank.mesh.dp_rank)
    batch.tensors.clear()
    played.engine.forward_backward(batch)
    outcome = played.engine.update(lr=0.0)
    if played.rank.mesh.rank == 0:
        played.found["term"] = torch.tensor(outcome.measured.extra_loss)


@pytest.mark.parametrize("name", ["dp2", "pp2_cp2_zbv"])
def test_a_mean_over_learnt_tokens_is_that_of_one_process(tmp_path, name):
    world, more = LAYOUTS[name]
    one, found = play(tmp_path, "one", step, TERM), play(tmp_path, "several", step, TERM, *more, world=world)
    assert one["term"].item() == pytest.approx(1, abs=0.05), "states are of norm 1 after their norm"
    assert worst_difference(found, one) < 2e-5
