"""Whatever layout wrote a checkpoint, any other reads the same bits."""

import random
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint.world import blank, checkpointers, random_tensors, same_bits, save, spread
from train.checkpoint.load import load
from train.checkpoint.manifest import verify

torch.set_num_threads(1)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**9), writers=st.integers(1, 4), readers=st.integers(1, 5))
def test_any_layout_reads_any_other(seed, writers, readers):
    rng = random.Random(seed)
    tensors = random_tensors(rng, rng.randint(1, 12))
    with tempfile.TemporaryDirectory() as folder:
        world = checkpointers(Path(folder), writers)
        results = save(world, 7, spread(rng, tensors, writers), samples=112)
        assert all(result.ok and result.warning is None for result in results)
        assert verify(results[0].path, full=True) == []
        for expected in spread(rng, tensors, readers):
            wanted = blank(expected)
            meta = load(results[0].path, wanted)
            assert same_bits(wanted, expected)
            assert meta == {"samples": 112, "step": 7, "attempt": 0, "world_size": writers}
