"""Intervals of several ranks that overlap, as those of replicas do: which elements are covered, which are read, and
which do not fit."""

import json

import pytest
import torch

from parallel.shard import Shard
from tests.checkpoint.world import checkpointers, save
from train.checkpoint.manifest import CheckpointDamaged, Entry, Manifest
from train.checkpoint.read_shards import FolderFiles, NotCovered, fill_shards, first_hole, load_shards, merge_indexes


@pytest.mark.parametrize(
    ("intervals", "hole"),
    [
        ([(0, 10), (2, 3), (10, 5)], None),
        ([(0, 10), (2, 3), (11, 4)], 10),
        ([(1, 14)], 0),
        ([(0, 14)], 14),
        ([], 0),
        ([(0, 5), (5, 0), (5, 10)], None),
    ],
)
def test_one_interval_may_lie_within_another(intervals, hole):
    assert first_hole(intervals, 0, 15) == hole


def test_what_lies_behind_an_interval_within_another_is_read(tmp_path):
    """The second rank has a part of what the first has; the third goes on behind the first."""
    whole = torch.arange(15.0)
    shards = [{"a": Shard(whole[begin:end].clone(), begin, (15,))} for begin, end in ((0, 10), (2, 5), (10, 15))]
    assert all(result.ok for result in save(checkpointers(tmp_path, 3), 1, shards))
    (folder,) = tmp_path.glob("step_*")
    for begin, end in ((0, 15), (3, 12), (10, 15), (1, 4)):
        wanted = Shard(torch.full((end - begin,), -1.0), begin, (15,))
        load_shards(folder, {"a": wanted})
        assert torch.equal(wanted.local, whole[begin:end])


def index_of(rank: int, **tensors: list) -> bytes:
    body = {"rank": rank, "step": 1, "attempt": 1, "header_bytes": 8, "data_bytes": 40, "tensors": tensors}
    return json.dumps(body).encode()


def test_ranks_that_disagree_on_a_tensor_make_no_checkpoint():
    own = index_of(0, a=["F32", [10], 0, 5, 0])
    found = merge_indexes([own, index_of(1, a=["F32", [10], 5, 5, 0])], {})
    assert found["tensors"]["a"] == ("F32", [10], [(0, 0, 5), (1, 5, 5)])
    for other in (["BF16", [10], 5, 5, 0], ["F32", [5, 2], 5, 5, 0]):
        with pytest.raises(NotCovered, match="on rank 1, but F32"):
            merge_indexes([own, index_of(1, a=other)], {})


def test_a_type_that_nobody_has_is_damage(tmp_path):
    manifest = Manifest(tmp_path, 1, 1, 1, {}, {}, {"a": Entry("F7", (4,), [(0, 0, 4)])})
    with pytest.raises(CheckpointDamaged, match="element type F7"):
        fill_shards(manifest, FolderFiles(tmp_path), {"a": Shard(torch.zeros(4), 0, (4,))})
