"""The mark of all weights is a sum that does not depend on the intervals that ranks read, or on the lossless storage
format."""

import random

import pytest
import torch

from parallel.shard import Shard, whole
from tests.checkpoint.world import spread
from train.checkpoint import weights_mark
from train.checkpoint.weights_mark import WeightsMark, same_weights

DRAW = torch.Generator().manual_seed(1)
WEIGHTS = {
    name: torch.randn(shape, generator=DRAW).bfloat16().float()
    for name, shape in (
        ("master.head.weight", (40, 7)),
        ("master.layers.1.moe.experts.w2", (4, 9, 8)),
        ("master.mtp.0.norm.weight", (50,)),
    )
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(weights_mark, "BLOCK", 16)
    monkeypatch.setattr(weights_mark, "BLOCKS_AT_ONCE", {"cpu": 3})
    weights_mark._block_factors.cache_clear()
    yield
    weights_mark._block_factors.cache_clear()


def mark_of(*ranks: dict[str, Shard]) -> str:
    marks = []
    for shards in ranks:
        mark = WeightsMark()
        mark.watching(lambda wanted: None)(shards)
        marks.append(mark)
    return marks[0].text(lambda parts: [list(one.parts) for one in marks])


def shards_of(weights: dict[str, torch.Tensor], kind: str = "master") -> dict[str, Shard]:
    return {name.replace("master", kind): whole(tensor) for name, tensor in weights.items()}


def test_intervals_of_any_ranks_replicas_and_formats_give_one_mark():
    expected = mark_of(shards_of(WEIGHTS))
    rng = random.Random(1)
    for ranks in (1, 2, 3, 4):
        world = spread(rng, WEIGHTS, ranks)
        assert mark_of(*world) == mark_of(*world, *world) == expected
    assert (
        mark_of({name: Shard(one.local.bfloat16(), 0, one.shape) for name, one in shards_of(WEIGHTS).items()})
        == expected
    )
    assert mark_of(shards_of(WEIGHTS, "ema")) == expected


def test_what_is_read_again_counts_once():
    mark, flat = WeightsMark(), WEIGHTS["master.head.weight"].flatten()
    for start, stop in ((20, 60), (100, 280), (10, 120), (0, 280), (30, 40)):
        mark.add("master.head.weight", flat[start:stop], start)
    assert mark.text() == mark_of(shards_of({"master.head.weight": flat}))


def test_a_single_changed_value_and_two_that_change_places_are_seen():
    expected = mark_of(shards_of(WEIGHTS))
    for name, tensor in WEIGHTS.items():
        for place in range(0, tensor.numel(), 5):
            changed = tensor.clone()
            changed.view(-1)[place] += 0.25
            assert not same_weights(mark_of(shards_of(WEIGHTS | {name: changed})), expected)
            moved = tensor.flatten().roll(1).view(tensor.shape)
            assert not same_weights(mark_of(shards_of(WEIGHTS | {name: moved})), expected)


def test_a_model_that_is_read_without_its_mtp_modules_is_the_same():
    main = {name: tensor for name, tensor in WEIGHTS.items() if ".mtp." not in name}
    assert same_weights(mark_of(shards_of(main)), mark_of(shards_of(WEIGHTS)))
    assert same_weights(None, mark_of(shards_of(main)))


def test_the_mark_is_that_of_every_version(monkeypatch):
    """Checkpoints and adapters keep it. Blocks have their real size here, and both zeros are one."""
    monkeypatch.undo()
    weights_mark._block_factors.cache_clear()
    values = torch.cat([torch.arange(-50, 50) / 8, torch.tensor([-0.0])])
    mark = WeightsMark()
    mark.add("master.norm.weight", values, 0)
    assert mark.text() == "61a96b09551eecb0"
