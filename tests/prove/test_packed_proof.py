"""Proofs of recipes whose samples share sequences but are independent: masks of learnt tokens, and padding."""

from dataclasses import replace

import pytest
import torch

from conf.load import compose
from tests.prove.proofs import PROOF, gather_evidence, small_proof
from tests.prove.test_prove import assert_exact, assert_holds
from train.data.batch import Batch
from train.prove import reference
from train.prove.judge import judge_all
from train.prove.miniature import shrink
from train.prove.recipe_values import read_values
from train.prove.samples import Samples, initial_biases, initial_weights

CHATS = ["data.format=chat", "batch_size=8", "model.mtp_depth=2", "optim.balance_loss=0.01", "optim.clip=0.1"]
EXACT = {
    "one process": [],
    "ep 2": ["parallel.dp=2", "parallel.ep=2"],
    "pp 2": ["parallel.pp=2", "parallel.schedule=zbv"],
    "cp 2": ["parallel.cp=2"],
    "uneven": ["parallel.dp=3", "parallel.uneven=true"],
    "frozen routers, detached MTP, pp 2": ["parallel.pp=2", "optim.freeze_routers=true", "optim.detach_mtp=true"],
    "pp 2, cp 2": ["parallel.pp=2", "parallel.cp=2", "parallel.schedule=dualpipev"],
}
WHOLE = {
    "frozen_detached": [
        "parallel.dp=2",
        "optim.freeze_routers=true",
        "optim.detach_mtp=true",
        "optim.weight_decay=0.1",
    ],
    # so few that one of the steps learns nothing
    "cp2_ep2_fp8": ["parallel.cp=2", "parallel.ep=2", "precision=fp8", "parallel.wire=fp8", "batch_size=2"],
    "dp3_uneven_bf16": ["parallel.dp=3", "parallel.uneven=true", "precision=bf16"],
    "cp2_bf16": ["parallel.cp=2", "precision=bf16"],
    "pp2_zbv_fp8": ["parallel.pp=2", "parallel.schedule=zbv", "precision=fp8"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_a_layout_is_exact(tmp_path, name):
    assert_exact(small_proof(tmp_path, *CHATS, *EXACT[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_a_layout_is_proven(tmp_path, name):
    config = small_proof(tmp_path, *CHATS, *WHOLE[name])
    gather_evidence(config)
    assert_holds(judge_all(config), config)


def alone(batch: Batch) -> list[Batch]:
    """Each sample of a batch in a sequence of its own that it fills."""
    found = []
    for tokens_S, documents_S, learnt_S in zip(batch.tokens_BS, batch.documents_BS, batch.supervised_BS, strict=True):
        for number in documents_S[documents_S >= 0].unique():
            here = documents_S == number
            found.append(Batch(tokens_S[here][None], torch.zeros_like(documents_S[here])[None], learnt_S[here][None]))
    return found


@pytest.mark.slow
def test_the_reference_of_packed_samples_is_that_of_one_at_a_time():
    """Losses, loads and gradients in fp64, each sample weighing what it learns, or in the balance loss as much as any other."""
    config = compose(*PROOF, *CHATS)
    batch = Samples(config).batch(0, 4)
    assert (batch.documents_BS < 0).any() and not batch.supervised_BS[2].any()

    def run(batches: list[Batch]) -> tuple[list[reference.WatchedPass], dict[str, torch.Tensor]]:
        weights = {name: weight.double().requires_grad_() for name, weight in initial_weights(config).items()}
        biases = {name: bias.double() for name, bias in initial_biases(config).items()}
        plain, seen = reference.PlainModel(read_values(config), weights, biases), []
        every, learnt = sum(one.sequences for one in batches), sum(one.targets for one in batches)
        for one in batches:
            made = plain.losses(one)
            share = one.targets / learnt
            made.main, *made.mtp = (loss * share if share else torch.zeros(()) for loss in (made.main, *made.mtp))
            made.balance = made.balance * (one.sequences / every)
            loss = made.main + 0.15 * sum(made.mtp) + made.balance
            if loss.requires_grad:
                loss.backward()
            seen.append(made)
        return seen, {name: weight.grad for name, weight in weights.items()}

    torch.set_default_dtype(torch.float64)
    try:
        apart = [one for one in alone(batch) if one.tokens_BS.size(1) > 3]
        longer = [one for one in alone(batch) if one.tokens_BS.size(1) <= 3]
        padded = [
            Batch(
                torch.cat([one.tokens_BS, torch.zeros(1, 3, dtype=torch.int64)], 1),
                torch.cat([one.documents_BS, torch.full((1, 3), -1, dtype=torch.int32)], 1),
                torch.cat([one.supervised_BS, torch.zeros(1, 3, dtype=torch.bool)], 1),
            )
            for one in longer
        ]
        (packed,), gradients = run([batch])
        each, sums = run(apart + padded)
    finally:
        torch.set_default_dtype(torch.float32)
    close = {"rtol": 1e-10, "atol": 1e-13}
    torch.testing.assert_close(sum(one.main for one in each), packed.main, **close)
    for depth, loss in enumerate(packed.mtp):
        torch.testing.assert_close(sum(one.mtp[depth] for one in each), loss, **close)
    torch.testing.assert_close(sum(one.balance for one in each), packed.balance, **close)
    for name, load_E in packed.loads.items():
        assert torch.equal(sum(one.loads[name] for one in each), load_E)
    for name, gradient in gradients.items():
        torch.testing.assert_close(sums[name], gradient, **close)


def test_a_miniature_keeps_chats():
    config = compose(*PROOF, *CHATS)
    assert shrink(replace(config, mode="prove")).cfg.data.chats
