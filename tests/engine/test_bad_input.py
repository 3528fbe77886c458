"""What a caller gives that cannot work is refused with field, value, rule and cure, and leaves the engine as it was."""

from dataclasses import replace

import pytest
import torch

from conf.errors import UserError
from tests.engine.scenario import Played, any_experts, play, policy_batch


def tripled(logprobs_BT, tokens):
    return logprobs_BT.sum()


def refused(played: Played) -> None:
    config, engine = played.config, played.engine
    good = policy_batch(config)
    experts = any_experts(config)
    beyond, same, far = experts.clone(), experts.clone(), experts.clone()
    beyond[1, 2, 0, 3], same[0, 0, 0, 1] = 8, experts[0, 0, 0, 0]
    far[0, 0, 0] = torch.tensor([0, 2, 4, 6])
    unlearnt = torch.zeros_like(good.supervised_BS)
    cases = [
        (lambda: engine.forward_backward(good, "rlhf"), r"loss = rlhf(.|\n)*must be one of cross_entropy"),
        (lambda: engine.forward_backward(good, "tests.engine.nowhere"), "defines no nowhere"),
        (lambda: engine.forward_backward(replace(good, tensors={}), "ppo"), r"advantages(.|\n)*for ppo(.|\n)*add it"),
        (lambda: engine.forward_backward(good, "ppo", terms=["mtps"]), "must be of mtp, balance, biases"),
        (lambda: engine.forward_backward(good, "ppo", last=False), "several calls"),
        (lambda: engine.forward_backward(replace(good, supervised_BS=unlearnt), "ppo"), "learnt token on some rank"),
        (lambda: engine.logprobs(replace(good, tokens_BS=good.tokens_BS + 300)), "must be token ids, 0 to 319"),
        (
            lambda: engine.logprobs(replace(good, tensors={"temperatures": torch.ones(8, 24)})),
            r"one value a token: \(8, 25\)",
        ),
        (lambda: engine.logprobs(replace(good, experts_BTLK=experts[:, :-1])), r"\(8, 24, 3, 4\)"),
        (lambda: engine.logprobs(replace(good, experts_BTLK=beyond)), "sequence 1, token 2, MoE layer 0"),
        (lambda: engine.logprobs(replace(good, experts_BTLK=same)), "4 different experts, 0 to 7"),
        (lambda: engine.logprobs(replace(good, experts_BTLK=far)), "of at most 2 of 4 groups"),
        (
            lambda: engine.forward_backward(replace(good, experts_BTLK=experts), "ppo", terms=["biases"]),
            "follow loads that the routers chose",
        ),
        (engine.update, "no forward_backward with last=True"),
        (lambda: engine.update(21), "must be a step of the recipe, 1 to 20"),
    ]
    for call, words in cases:
        with pytest.raises(UserError, match=words):
            call()
    with pytest.raises(UserError, match="must be the loss of every token"):
        engine.forward_backward(good, tripled)
    engine.forward_backward(good, "ppo")
    with pytest.raises(UserError, match="update or discard did not"):
        engine.forward_backward(good, "ppo")
    with pytest.raises(UserError, match="comes between steps"):
        engine.weights()
    played.update()


def plain(played: Played) -> None:
    played.engine.forward_backward(policy_batch(played.config), "ppo")
    played.update()


def test_bad_input_is_refused_and_changes_nothing(tmp_path):
    found, want = (
        play(tmp_path, "refused", refused, "micro_batch_size=2"),
        play(tmp_path, "plain", plain, "micro_batch_size=2"),
    )
    assert all(torch.equal(found[key], want[key]) for key in want)


def odd_batches(played: Played) -> None:
    batch = policy_batch(played.config)
    with pytest.raises(UserError, match="a multiple of micro_batch_size=2"):
        played.engine.logprobs(
            replace(batch, tokens_BS=batch.tokens_BS[:3], documents_BS=None, supervised_BS=None, tensors={})
        )
    with pytest.raises(UserError, match="one token more than a multiple of 4 positions"):
        played.engine.logprobs(
            replace(batch, tokens_BS=batch.tokens_BS[:, :-1], documents_BS=None, supervised_BS=None, tensors={})
        )


def test_a_batch_that_the_layout_cannot_split_is_refused(tmp_path):
    play(tmp_path, "cp2", odd_batches, "parallel.cp=2", "micro_batch_size=2", world=2)


def no_number(played: Played) -> None:
    batch = policy_batch(played.config)
    batch.tensors["old_logprobs"].fill_(torch.nan)
    before = {name: shard.local.clone() for name, shard in played.parts.zero.shards().items()}
    played.engine.forward_backward(batch, "ppo")
    assert not played.engine.update().update.applied
    assert all(torch.equal(shard.local, before[name]) for name, shard in played.parts.zero.shards().items())
    plain(played)


def test_a_loss_that_is_no_number_changes_nothing(tmp_path):
    play(tmp_path, "nan", no_number)
