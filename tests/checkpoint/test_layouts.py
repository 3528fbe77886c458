"""Any layout reads the same bits from a checkpoint, whatever layout wrote it."""

import os
import random
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.run_files import data_name
from conf.errors import UserError
from conf.thresholds import THRESHOLDS
from parallel.shard import Shard, whole
from tests.checkpoint.world import blank, checkpointers, random_tensors, same_bits, save, spread
from train.checkpoint.manifest import seal, verify
from train.checkpoint.read_shards import load_shards

torch.set_num_threads(1)


def small_blocks(patch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 bytes and buffers of 100, so that small tensors cross their borders."""
    for module in ("manifest", "staging", "read_shards"):
        patch.setattr(f"train.checkpoint.{module}.CRC_BLOCK", 64)
    patch.setattr(THRESHOLDS, "staging_bytes", 100)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**9), writers=st.integers(1, 4), readers=st.integers(1, 5), small=st.booleans())
def test_any_layout_reads_any_other(seed, writers, readers, small):
    rng = random.Random(seed)
    tensors = random_tensors(rng, rng.randint(1, 12))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if small:
            small_blocks(patch)
        world = checkpointers(Path(folder), writers)
        results = save(world, 7, spread(rng, tensors, writers), samples=112)
        assert all(result.ok and result.warning is None for result in results)
        assert verify(results[0].path, full=True) == []
        for expected in spread(rng, tensors, readers):
            wanted = blank(expected)
            meta = load_shards(results[0].path, wanted)
            assert same_bits(wanted, expected)
            assert meta == {"samples": 112, "step": 7, "attempt": 0, "world_size": writers}


def test_buffers_serve_saves_of_any_size(tmp_path, monkeypatch):
    small_blocks(monkeypatch)
    (checkpointer,) = world = checkpointers(tmp_path, 1, keep=0)
    sizes = [100, 7, 0, 1000, 48, 500]
    for step, size in enumerate(sizes):
        state = {"x": whole(torch.arange(size).float() + step), "y": whole(torch.tensor(step))}
        (result,) = save(world, step, [state])
        wanted = blank(state)
        checkpointer.load(result.path, wanted)
        assert same_bits(wanted, state)


def test_replicas_on_several_ranks_are_read_once(tmp_path):
    bias = torch.arange(12.0).view(3, 4)
    shards = [{"bias": whole(bias)}, {"bias": Shard(bias.view(-1)[4:], 4, (3, 4))}, {"bias": whole(bias)}]
    path = save(checkpointers(tmp_path, 3), 1, shards)[0].path
    wanted = {"bias": Shard(torch.zeros(9), 2, (3, 4))}
    load_shards(path, wanted)
    assert torch.equal(wanted["bias"].local, bias.view(-1)[2:11])


def test_a_part_costs_only_its_blocks(tmp_path, monkeypatch):
    big = torch.arange(100_000, dtype=torch.float64)
    small_blocks(monkeypatch)
    path = save(checkpointers(tmp_path, 1), 1, [{"big": whole(big)}])[0].path
    read, real = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: read.append(real(*a)) or read[-1])
    wanted = {"big": Shard(torch.zeros(20, dtype=torch.float64), 50_001, (100_000,))}
    load_shards(path, wanted)
    assert torch.equal(wanted["big"].local, big[50_001:50_021])
    assert sum(read) == 3 * 64  # elements 1 to 20 after a border, 8 to a block


def test_other_tools_open_the_data_files(tmp_path):
    rng = random.Random(3)
    tensors = random_tensors(rng, 14)
    shards = spread(rng, tensors, 2)
    path = save(checkpointers(tmp_path, 2), 1, shards)[0].path
    for rank, own in enumerate(shards):
        found = safetensors.torch.load_file(path / data_name(rank))
        assert found.keys() == own.keys()
        assert same_bits({name: Shard(t, 0, t.shape) for name, t in found.items()}, own)


def test_wider_types_take_every_value(tmp_path):
    moments = torch.randn(50).bfloat16()
    path = save(checkpointers(tmp_path, 1), 1, [{"exp_avg.w": whole(moments)}])[0].path
    wanted = {"exp_avg.w": whole(torch.zeros(50))}
    load_shards(path, wanted)
    assert torch.equal(wanted["exp_avg.w"].local, moments.float())


@pytest.mark.parametrize(
    ("name", "shard", "field", "rule"),
    [
        ("v", whole(torch.zeros(6)), "checkpoint: v", "must hold the tensor v"),
        ("w", whole(torch.zeros(3, 2)), "checkpoint: w", "shape (2, 3) in the checkpoint, but (3, 2)"),
        (
            "w",
            whole(torch.zeros(2, 3).bfloat16()),
            "checkpoint: w",
            "torch.float32 in the checkpoint and torch.bfloat16",
        ),
        ("w", whole(torch.zeros(2, 3, dtype=torch.int32)), "checkpoint: w", "cannot represent every value"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, name, shard, field, rule):
    path = save(checkpointers(tmp_path, 1), 1, [{"a": whole(torch.ones(4)), "w": whole(torch.ones(2, 3))}])[0].path
    wanted = {"a": whole(torch.zeros(4)), name: shard}
    with pytest.raises(UserError) as caught:
        load_shards(path, wanted)
    assert caught.value.field == field and rule in caught.value.rule and caught.value.cure
    assert not any(shard.local.any() for shard in wanted.values())


def test_a_hole_is_named_at_the_save(tmp_path):
    """Found when it can still be repaired, not at the resume."""
    shards = [{"w": Shard(torch.ones(4), 0, (2, 5))}, {"w": Shard(torch.ones(5), 5, (2, 5))}]
    result = save(checkpointers(tmp_path, 2), 1, shards)[0]
    assert not result.ok and "no rank saved element 4 of w" in result.warning
    assert not list(tmp_path.glob("*step*"))


def test_folders_that_are_not_ours(tmp_path):
    wanted = {"w": whole(torch.zeros(2))}
    with pytest.raises(UserError, match="does not exist"):
        load_shards(tmp_path / "nowhere", wanted)
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        load_shards(tmp_path, wanted)
    (tmp_path / "manifest.json").write_text('{"name": "some web app"}')
    with pytest.raises(UserError, match="without format"):
        load_shards(tmp_path, wanted)
    (tmp_path / "manifest.json").write_text(seal({"format": "sluice checkpoint", "version": 99}))
    with pytest.raises(UserError, match="format version 99, newer than 1"):
        load_shards(tmp_path, wanted)
