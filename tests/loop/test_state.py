"""The state of a rank: which rank saves which part, what a checkpoint leaves to the run, and a resume with another
optimizer."""

import json
from types import SimpleNamespace

import torch

from conf.load import compose
from conf.schema import ModelFamily
from parallel.shard import whole
from train.loop.hooks.averaged_weights import weight_averages
from train.loop.state import RunState


def state_of(*words: str, rank: int = 0, stage_rank: int = 0) -> RunState:
    """Of a rank with one weight of three elements and its momentum, and one router."""
    tensors = {name: torch.full((3,), value) for name, value in (("master.a", 2.0), ("exp_avg.a", 3.0))}
    updates: list[int] = []
    zero = SimpleNamespace(
        shards=lambda copies=False: {name: whole(tensor) for name, tensor in tensors.items()},
        finish_load=updates.append,
        loaded=updates,
        client=SimpleNamespace(updates=7),
    )
    routers = {"layers.1": SimpleNamespace(bias_E=torch.zeros(4))}
    parts = SimpleNamespace(zero=zero, routers=lambda: routers, chunks=[])
    config = compose("conf=tiny", "data.path=none", *words)
    mesh = SimpleNamespace(rank=rank, stage_rank=stage_rank)
    return RunState(config, mesh, parts, weight_averages(config, zero))


def test_a_state_goes_on_from_what_it_says_of_itself():
    one, other = state_of("optim.ema_decay=0.5"), state_of("optim.ema_decay=0.5")
    one.step, one.samples, one.skipped, one.best, one.family = 5, 40, 2, (3, 1.5), ModelFamily.mistral_large_3
    meta = json.loads(json.dumps(one.meta()))
    assert meta["has_ema"] and not state_of().meta()["has_ema"]
    other.finish_load(meta)
    assert (other.step, other.samples, other.skipped, other.best) == (5, 40, 2, (3, 1.5))
    assert other.family is ModelFamily.mistral_large_3 and other.zero.loaded == [7]


def test_an_average_that_a_checkpoint_lacks_begins_with_its_weights():
    for kept in (True, False):
        state = state_of("optim.ema_decay=0.5")
        assert ("ema.a" in state.wanted({"has_ema": kept})) == kept
        state.wanted({"has_ema": kept})["master.a"].local.fill_(8)  # what is read
        state.finish_load(state.meta() | {"has_ema": kept})
        assert state.keepers[0].ema.average["master.a"].tolist() == [2.0 if kept else 8.0] * 3


def test_what_several_ranks_have_alike_is_saved_by_the_first():
    own = {"master.a", "exp_avg.a", "ema.a"}
    for rank, stage_rank, more in (
        (0, 0, {"bias.layers.1", "running.load", "running.idle"}),
        (4, 0, {"bias.layers.1"}),
        (1, 1, set()),
    ):
        assert state_of("optim.ema_decay=0.5", rank=rank, stage_rank=stage_rank).shards().keys() == own | more
    everywhere = {"bias.layers.1", "running.load", "running.idle", "master.a", "exp_avg.a"}
    assert state_of(rank=1, stage_rank=1).wanted({"has_ema": True}).keys() == everywhere


def test_what_an_optimizer_keeps_begins_at_0_behind_another_one():
    state = state_of()
    assert "exp_avg.a" not in state.wanted({"has_ema": False}, own_optimizer=False)
    values = {name: shard.local.tolist() for name, shard in state.zero.shards().items()}
    assert values == {"master.a": [2.0] * 3, "exp_avg.a": [0.0] * 3}


def test_an_average_saved_is_that_of_all_updates():
    state = state_of("optim.ema_decay=0.25")
    for _ in range(2):
        state.zero.shards()["master.a"].local.mul_(2)
        state.keepers[0].ema.update()
    assert state.shards()["ema.a"].local.tolist() == [0.25 * (0.25 * 2 + 0.75 * 4) + 0.75 * 8] * 3
