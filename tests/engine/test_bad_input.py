"""Bad input of a caller is refused with field, value, rule and cure, and does not change the engine."""

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conf.errors import UserError
from tests.engine.scenario import Played, any_experts, config_of, play, policy_batch, rows_of, share, worst_difference
from tests.ranks import run_processes, run_ranks
from train.data.batch import Batch, GivenSample, batch_of_samples
from train.loop.open_engine import open_engine


def tripled(logprobs_BT, tokens):
    return logprobs_BT.sum()


class _Failing:
    """A loss that fails at the third micro-batch, when gradients of two are there."""

    calls = 0

    def __call__(self, logprobs_BT, tokens):
        self.calls += 1
        if self.calls == 3:
            raise ValueError("not this one")
        return -logprobs_BT


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
        (lambda: engine.forward_backward(good, "ppo", terms=["mtps"]), "must be some of mtp, balance, biases"),
        (lambda: engine.forward_backward(good, "ppo", last=False), "several calls"),
        (lambda: engine.forward_backward(replace(good, supervised_BS=unlearnt), "ppo"), "learnt token on some rank"),
        (lambda: engine.logprobs(replace(good, tokens_BS=good.tokens_BS + 300)), "must be token ids, 0 to 319"),
        (
            lambda: engine.logprobs(replace(good, tensors={"temperatures": torch.ones(8, 24)})),
            r"one value per token: \(8, 25\)",
        ),
        (lambda: engine.logprobs(replace(good, experts_BTLK=experts[:, :-1])), r"\(8, 24, 3, 4\)"),
        (lambda: engine.logprobs(replace(good, experts_BTLK=experts.numpy())), r"ndarray(.|\n)*of whole numbers"),
        (lambda: engine.logprobs(replace(good, keys_BTLK=experts + 0.5)), r"float32(.|\n)*of whole numbers"),
        (lambda: engine.logprobs(replace(good, experts_BTLK=beyond)), "sequence 1, token 2, MoE layer 0"),
        (lambda: engine.logprobs(replace(good, experts_BTLK=same)), "4 different experts, 0 to 7"),
        (lambda: engine.logprobs(replace(good, experts_BTLK=far)), "of at most 2 of 4 groups"),
        (
            lambda: engine.forward_backward(replace(good, experts_BTLK=experts), "ppo", terms=["biases"]),
            "need loads that the routers chose",
        ),
        (lambda: engine.forward_backward(good, "ppo", clipp=1), "unexpected keyword argument 'clipp'"),
        (lambda: engine.forward_backward(good, "math.pi"), "must be a function of"),
        (lambda: engine.logprobs(replace(good, tokens_BS=good.tokens_BS[0])), r"tensor \(sequences, tokens\)"),
        (lambda: engine.logprobs(replace(good, supervised_BS=good.supervised_BS.float())), "of torch.bool"),
        (lambda: engine.logprobs(replace(good, documents_BS=good.documents_BS * 2)), "0, 1, 2, ..., each in one piece"),
        (lambda: engine.logprobs(replace(good, documents_BS=1 - good.documents_BS)), "0, 1, 2, ..., each in one piece"),
        (lambda: engine.logprobs(replace(good, tensors={"mean": torch.ones(8, 25)})), "reserved name"),
        (lambda: engine.logprobs(replace(good, tensors={"advantages": [1.0]})), "one value per token"),
        (
            lambda: engine.logprobs(replace(good, tensors={"temperatures": torch.zeros(8, 25)})),
            "above 0 at every learnt",
        ),
        (lambda: engine.forward_backward(replace(good, supervised_BS=None), "ppo"), "if a batch has padding"),
        (lambda: engine.forward_backward(Batch(good.tokens_BS[:, :2])), "1 MTP modules predict later tokens"),
        (engine.update, "a forward_backward with last=True"),
        (lambda: engine.update(21), "must be a step of the recipe, 1 to 20"),
    ]
    for call, words in cases:
        with pytest.raises(UserError, match=words):
            call()
    with pytest.raises(UserError, match="must be the loss of every token"):
        engine.forward_backward(good, tripled)
    with pytest.raises(RuntimeError, match="failed to run forward"):
        engine.forward_backward(good, _Failing())
    engine.forward_backward(good, "ppo")
    with pytest.raises(UserError, match="must be a number of 0 or more"):
        engine.update(lr=math.nan)
    with pytest.raises(UserError, match="without update or discard"):
        engine.forward_backward(good, "ppo")
    with pytest.raises(UserError, match="must be called between steps"):
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


def replayed_in_part(played: Played) -> None:
    engine, batch = played.engine, policy_batch(played.config)
    first = replace(rows_of(batch, 0, 4), experts_BTLK=any_experts(played.config)[:4])
    total = engine.count([batch])
    engine.forward_backward(first, "ppo", last=False, total=total)
    engine.forward_backward(rows_of(batch, 4, 8), "ppo", total=total)
    played.update()


def test_a_step_that_replays_experts_in_some_calls_moves_no_biases(tmp_path):
    biases = [tensor for key, tensor in play(tmp_path, "one", replayed_in_part).items() if key.startswith("bias")]
    assert len(biases) == 4 and not any(tensor.any() for tensor in biases)


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


def unequal_shares(played: Played) -> None:
    batch = share(played.config, policy_batch(played.config), played.rank.mesh.dp_rank)
    with pytest.raises(UserError, match="as many on every data-parallel rank"):
        played.engine.forward_backward(rows_of(batch, 0, 2 + played.rank.mesh.dp_rank), "ppo")
    played.engine.forward_backward(batch, "ppo")
    played.update()


def test_shares_of_unequal_size_are_refused_on_all_ranks(tmp_path):
    play(tmp_path, "unequal", unequal_shares, "parallel.dp=2", world=2)


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


def summed_too(logprobs_BT, tokens):
    """A loss that also looks at tokens that are not learnt."""
    return -logprobs_BT * (1 + logprobs_BT.sum(1, keepdim=True)) * tokens["ref_logprobs"]


def unlearnt(played: Played, odd: bool = True) -> None:
    """Rows without learnt tokens, with values at tokens that are not learnt which give no number in any loss."""
    batch = policy_batch(played.config)
    batch.supervised_BS[:2] = False
    batch.supervised_BS[2, 13:] = False  # of ranks that share the row, one learns nothing
    if odd:
        for name, value in {
            "old_logprobs": -math.inf,
            "advantages": math.nan,
            "temperatures": 0.0,
            "ref_logprobs": 50.0,
        }.items():
            batch.tensors[name].masked_fill_(~batch.supervised_BS, value)
    mine = share(played.config, batch, played.rank.mesh.dp_rank)
    for loss in ("ppo", "gspo", summed_too):
        played.engine.forward_backward(mine, loss)
        played.update()


def unlearnt_plainly(played: Played) -> None:
    unlearnt(played, odd=False)


@pytest.mark.parametrize("more", [[], ["parallel.cp=2", "micro_batch_size=2"]], ids=["one", "cp2"])
def test_what_stands_at_tokens_that_are_not_learnt_counts_nowhere(tmp_path, more):
    want = play(tmp_path, "plain", unlearnt_plainly)
    found = play(tmp_path, "odd", unlearnt, *more, world=1 + bool(more))
    assert worst_difference(found, want) < 2e-5


def test_samples_that_do_not_fit_are_refused():
    sample, experts = GivenSample([1, 2, 3], 2, {"temperatures": 0.8}), torch.zeros(2, 3, 4, dtype=torch.int64)
    assert batch_of_samples([sample], 5).tensors["temperatures"].tolist() == [[1, 1, pytest.approx(0.8), 1, 1]]
    for samples, words in (
        ([], "must be one or more"),
        ([replace(sample, experts_TLK=experts), sample], "give experts as the first one does"),
        ([replace(sample, experts_TLK=experts[:1])], "tokens but the last, MoE layers, experts"),
    ):
        with pytest.raises(UserError, match=words):
            batch_of_samples(samples, 5)


def two_engines(rank: int, folder: str) -> None:
    config = config_of(f"runs={folder}", "resume=never")
    first, second = open_engine(config), open_engine(config)
    batch = policy_batch(config)
    assert torch.equal(first.logprobs(batch), second.logprobs(batch))
    first.forward_backward(batch, "ppo")
    first.update()
    before = second.logprobs(batch)
    path = first.save(Path(folder) / "checkpoints")
    assert first.save(Path(folder) / "checkpoints") == path, "the same step again"
    second.load(path)
    assert torch.equal(first.logprobs(batch), second.logprobs(batch)) and not torch.equal(before, first.logprobs(batch))


def test_a_process_opens_two_engines_that_resume_nothing(tmp_path):
    run_ranks(two_engines, str(tmp_path), world_size=1)


def lone_engine(rank: int, folder: str) -> None:
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    engine = open_engine(config_of(f"runs={folder}", "resume=never"))
    assert "GLOO_SOCKET_IFNAME" not in os.environ, "ranks of a session on other nodes would take it from this process"
    engine.forward_backward(policy_batch(engine._config), "ppo")
    engine.update()
    engine.save(Path(folder) / "checkpoints")


def test_an_engine_of_one_process_names_no_interface_for_its_children(tmp_path):
    run_processes(lone_engine, str(tmp_path), world_size=1)
