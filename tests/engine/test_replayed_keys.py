"""`Batch.keys_BTLK`: a batch may name the keys of sparse attention, in every layout; what is no choice of this model is refused."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from conf.errors import UserError
from tests.engine.scenario import Played, play, policy_batch, share, worst_difference
from train.data.batch import Batch, GivenSample, batch_of_samples
from train.kernels.plain.plain_kernels import PlainKernels

SPARSE = [
    *("model.sparse.heads=4", "model.sparse.head_dim=12", "model.sparse.top_k=4", "model.layers=4"),
    *("model.sparse.pattern=FSFF", "model.init_std=0.1"),
]
LAYERS, TOP_K = 3, 4
LAYOUTS = {
    "cp2": (2, ["parallel.cp=2", "micro_batch_size=2"]),
    "pp2_dp2": (4, ["parallel.pp=2", "parallel.dp=2", "parallel.split=[2,2]", "model.recompute=[layer]"]),
}


def any_keys(batch: Batch) -> Tensor:
    """Keys for every token but the last: of its document, up to itself."""
    draw = torch.Generator().manual_seed(5)
    rows, length = batch.tokens_BS.shape
    keys = torch.full((rows, length - 1, LAYERS, TOP_K), -1, dtype=torch.int32)
    for row in range(rows):
        for token in range(length - 1):
            first = batch.documents_BS[row].tolist().index(batch.documents_BS[row, token])
            for layer in range(LAYERS):
                chosen = first + torch.randperm(token - first + 1, generator=draw)[:TOP_K]
                keys[row, token, layer, : len(chosen)] = chosen.int()
    return keys


def step(played: Played) -> None:
    batch = policy_batch(played.config)
    mine = share(played.config, batch, played.rank.mesh.dp_rank)
    first = played.rank.mesh.dp_rank * len(mine.tokens_BS)
    mine = replace(mine, keys_BTLK=any_keys(batch)[first : first + len(mine.tokens_BS)])
    played.engine.forward_backward(mine, "ppo", clip=0.3)
    played.update()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return play(tmp_path_factory.mktemp("keys"), "one", step, *SPARSE)


@pytest.mark.parametrize("name", LAYOUTS)
def test_replayed_keys_in_a_layout_are_those_of_one_process(tmp_path, one, name):
    world, more = LAYOUTS[name]
    assert worst_difference(play(tmp_path, name, step, *SPARSE, *more, world=world), one) < 2e-5


def alone(played: Played) -> None:
    batch, engine = policy_batch(played.config), played.engine
    chosen: list[Tensor] = []
    original = PlainKernels.choose_keys

    def keep(self, index, seen, top_k):
        chosen.append(original(self, index, seen, top_k))
        return chosen[-1]

    with mock.patch.object(PlainKernels, "choose_keys", keep):
        own = engine.logprobs(batch)
    micro_batches = [torch.stack(chosen[i : i + LAYERS], 2) for i in range(0, len(chosen), LAYERS)]
    keys = torch.cat(micro_batches)
    with mock.patch.object(PlainKernels, "choose_keys", lambda *_: pytest.fail("an indexer chose")):
        again = engine.logprobs(replace(batch, keys_BTLK=keys))
        other = engine.logprobs(replace(batch, keys_BTLK=any_keys(batch)))
    learnt = batch.supervised_BS
    assert torch.equal(again[learnt], own[learnt]) and not torch.equal(other[learnt], own[learnt])
    wrong = {
        "too few": (1, 5, 0, keys[1, 5, 0].where(torch.arange(TOP_K) < 1, -1)),
        "of a later token": (0, 3, 2, torch.tensor([0, 1, 2, 4])),
        "twice": (0, 4, 1, torch.tensor([0, 1, 1, 2])),
        "of the document before": (0, 9, 0, torch.tensor([0, 7, 8, 9])),
        "below -1": (0, 1, 0, torch.tensor([0, 1, -2, -1])),
    }
    for row, token, layer, given in wrong.values():
        bad = keys.clone()
        bad[row, token, layer] = given.int()
        with pytest.raises(UserError, match=f"sequence {row}, token {token}, layer {layer} of those that choose"):
            engine.logprobs(replace(batch, keys_BTLK=bad))
    with pytest.raises(UserError, match=r"must be \(8, 24, 3, 4\)"):
        engine.logprobs(replace(batch, keys_BTLK=keys[:, :, :2]))
    filling = keys.clone()
    filling[0, 20:] = 99  # no token there
    assert torch.equal(engine.logprobs(replace(batch, keys_BTLK=filling))[learnt], own[learnt])


def test_what_the_indexers_choose_and_a_replay_of_it_are_the_same(tmp_path):
    play(tmp_path, "alone", alone, *SPARSE)


def dense(played: Played) -> None:
    batch = policy_batch(played.config)
    with pytest.raises(UserError, match="layers of the main model that choose"):
        played.engine.logprobs(replace(batch, keys_BTLK=any_keys(batch)))


def test_a_model_without_indexers_takes_no_keys(tmp_path):
    play(tmp_path, "dense", dense)


def test_samples_bring_their_keys_into_a_batch():
    keys_TLK = torch.tensor([[[0, -1]], [[0, 1]]], dtype=torch.int32)
    made = batch_of_samples([GivenSample([3, 4, 5], 1, keys_TLK=keys_TLK)], 5)
    assert made.keys_BTLK.tolist() == [[[[0, -1]], [[0, 1]], [[-1, -1]], [[-1, -1]]]]
