"""Losses of tokens, replay and log-probabilities in every layout: gradients, losses, loads and biases are those of one process."""

from dataclasses import replace

import pytest
import torch

from tests.engine.scenario import (
    LAYOUTS,
    Played,
    any_experts,
    play,
    policy_batch,
    rows_of,
    share,
    worst_difference,
)

LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "gspo", "kl")


def every_loss(played: Played) -> None:
    """Log-probabilities, and an update by each loss; then one with replayed experts, in two calls."""
    config, engine, mesh = played.config, played.engine, played.rank.mesh
    batch = policy_batch(config)
    mine = share(config, batch, mesh.dp_rank)
    if mesh.stage_rank in range(0, mesh.layout.stage_ranks, mesh.layout.cp) and mesh.pp_rank == 0:
        whole = torch.full(batch.tokens_BS.shape, torch.nan)
        first = mesh.dp_rank * len(mine.tokens_BS)
        whole[first : first + len(mine.tokens_BS)] = engine.logprobs(mine)
        played.found["logprobs"] = whole
    else:
        engine.logprobs(mine)
    for loss in LOSSES:
        engine.forward_backward(mine, loss)
        played.update()
    mine = share(config, replace(batch, experts_BTLK=any_experts(config)), mesh.dp_rank)
    engine.forward_backward(mine, "ppo", clip=0.3, terms=("balance",))
    played.update()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("losses")


@pytest.fixture(scope="module")
def one(folder):
    return play(folder, "one", every_loss)


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_of_tokens_in_a_layout_are_those_of_one_process(folder, one, name):
    world, more = LAYOUTS[name]
    found = play(folder, name, every_loss, *more, world=world)
    assert {key for key in one if key.startswith("loads")} == {f"loads.{number}" for number in range(1, 8)}
    for key in one:
        if key.startswith(("loads", "bias")):
            assert torch.equal(found[key], one[key]), key
    assert worst_difference(found, one) < 2e-5


def in_calls(played: Played, *parts: tuple[int, int]) -> None:
    """A step of the policy loss and one of the recipe's own, each in these parts of this rank's share; discarded calls before and
    log-probabilities in between change nothing.
    """
    config, engine = played.config, played.engine
    policy = share(config, policy_batch(config), played.rank.mesh.dp_rank)
    reduced: list[str] = []
    played.parts.zero.local_observer = lambda name, shard: reduced.append(name)
    for batch, loss in (
        (policy, "gspo"),
        (replace(policy, documents_BS=None, supervised_BS=None, tensors={}), "cross_entropy"),
    ):
        engine.forward_backward(
            rows_of(batch, 0, 2), "kl" if batch.tensors else loss, last=False, total=engine.count([batch])
        )
        engine.discard()
        engine.forward_backward(batch, "cispo" if batch.tensors else loss)  # of a whole step too
        engine.discard()
        batches = [rows_of(batch, first, end) for first, end in parts]
        total = engine.count(batches)
        for one in batches:
            reduced.clear()
            engine.forward_backward(one, loss, last=one is batches[-1], total=total)
            assert bool(reduced) == (one is batches[-1] or config.parallel.zero == 3)
            engine.logprobs(rows_of(policy, 0, 2))
        played.update()


def in_one_call(played: Played) -> None:
    in_calls(played, (0, 8 // played.config.parallel.dp))


def in_two_calls(played: Played) -> None:
    in_calls(played, (0, 2), (2, 8 // played.config.parallel.dp))


def in_four_calls(played: Played) -> None:
    in_calls(played, *((first, first + 2) for first in range(0, 8 // played.config.parallel.dp, 2)))


CALLS = {
    "one_process": (1, in_four_calls, []),
    "zero1": (2, in_two_calls, ["parallel.dp=2"]),
    "zero1_bf16": (2, in_two_calls, ["parallel.dp=2", "precision=bf16"]),
    "zero2": (2, in_two_calls, ["parallel.dp=2", "parallel.zero=2"]),
    "zero3": (2, in_two_calls, ["parallel.dp=2", "parallel.ep=2", "parallel.zero=3"]),
    "zero1_zbv_bf16": (
        4,
        in_two_calls,
        ["parallel.pp=2", "parallel.dp=2", "parallel.schedule=zbv", "precision=bf16"],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_several_calls_before_an_update_equal_one(tmp_path, name):
    world, several, more = CALLS[name]
    one = play(tmp_path, "one", in_one_call, *more, world=world)
    found = play(tmp_path, "several", several, *more, world=world)
    for key in one:
        if key.startswith(("loads", "bias")):
            assert torch.equal(found[key], one[key]), key
    assert worst_difference(found, one) < (5e-3 if "bf16" in name else 2e-6)


def step(played: Played, asks: bool = False) -> None:
    """A step in two calls; asks: with log-probabilities between and after them."""
    policy = share(played.config, policy_batch(played.config), played.rank.mesh.dp_rank)
    half = len(policy.tokens_BS) // 2
    batches = [rows_of(policy, 0, half), rows_of(policy, half, 2 * half)]
    for one in batches:
        played.engine.forward_backward(one, "ppo", last=one is batches[-1], total=played.engine.count(batches))
        if asks:
            played.engine.logprobs(policy)
    played.update()
    report = played.parts.precision.health()
    assert bool(report.metrics) == (played.config.precision.fp8 is not None)
    if report.metrics:
        played.found[f"health.{played.rank.mesh.rank}"] = torch.tensor(
            [report.metrics[key] for key in sorted(report.metrics)]
        )


def asking_step(played: Played) -> None:
    step(played, asks=True)


QUIET = {
    "fp8": (1, ["precision=fp8", "precision.fp8.health.every=1"]),
    "dropout": (
        1,
        ["adapter=lora", "adapter.rank=8", "adapter.dropout=0.3", "optim.bias_speed=[{value: 0}]", "init_from=none"],
    ),
    "zero3_again": (2, ["parallel.dp=2", "parallel.zero=3", "model.recompute=[norm,layer:2]"]),
    "pp2_fp8": (2, ["parallel.pp=2", "precision=fp8", "precision.fp8.health.every=1"]),
}


@pytest.mark.parametrize("name", QUIET)
def test_log_probabilities_change_no_bit(tmp_path, name):
    world, more = QUIET[name]
    quiet, asked = (
        play(tmp_path, "quiet", step, *more, world=world),
        play(tmp_path, "asked", asking_step, *more, world=world),
    )
    assert quiet.keys() == asked.keys() and all(torch.equal(quiet[key], asked[key]) for key in quiet)
