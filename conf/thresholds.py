"""Sizes at which code goes another way: a second block, bucket, page or piece begins beyond them. One table for all packages.

They are for speed alone: whatever their values, the same is computed. So mode=prove lowers all of them in some of its runs, where
the small tensors of a proof then go both ways, and every one has to stand here: tests/test_thresholds.py refuses a size that is
compared with a constant of its own. Keys of the schema that say sizes (`model.loss_chunk`) are no part of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields


@dataclass
class Thresholds:
    """Read where they are used, so that a change acts at once."""

    attention_queries: int = 128
    """Queries of a block of attention; half of it in rectangles below four blocks, where more would lie above the diagonal."""
    attention_scores: int = 1 << 20
    """Scores of a block at a time on a CPU, in fp32 4 MiB: as many heads as that takes, so that they stay in the cache."""
    gate_and_up: int = 1 << 18
    """Elements of [gate | up] whose fp32 copies stay in a CPU's cache."""
    fp8_gate_and_up: int = 1 << 19
    """Elements of [gate | up] of experts in FP8 at a time, whose rows are worked on together with their scales."""
    logits: int = 1 << 18
    """Logits in fp32 at a time on CPU: 1 MiB."""
    product_tiles: int = 400
    """Tiles of 128x128 of an FP8 product of experts from which a program of a GPU takes two that are neighbours. By an estimate
    it takes 1.6 times as long for them: with fewer tiles, half as many programs keep 132 multiprocessors busy for no less time."""
    expert_rows: int = 32
    """To whose multiples the rows of an expert are rounded up. 16 and 64 are as fast: more kernels, or more added rows."""
    stays_bytes: int = 1 << 10
    """Bytes of the largest storage that is not offloaded."""
    adamw_elements: int = 1 << 18
    """Elements updated at a time where moments are bf16: their fp32 copies stay in the cache, so memory is passed over once."""
    muon_elements: int = 1 << 24
    """Elements of matrices that a rank orthogonalises at a time, at most, but for one that is larger."""
    norm_row: int = 4096
    """Elements whose squares are summed in fp32."""
    base_elements: int = 1 << 26
    """Elements of a frozen base's matrices that are read into blocks together, at most but for one that is larger: 256 MB in fp32."""
    compared_elements: int = 1 << 24
    """Elements of a weight that are compared with those before an update at a time: 64 MB on the device."""
    bucket_elements: int = 50_000_000
    """Gradients that are reduced together, at most."""
    host_page_bytes: int = 1 << 16
    """Bytes of a page of the host's store for a CPU."""
    gpu_page_bytes: int = 1 << 23
    """Bytes of a page for a GPU: large enough that a copy takes longer than its launch."""
    staging_bytes: int = 1 << 28
    """Bytes of one buffer of a checkpoint's copy. A power of two, as page-locked allocations are rounded up to one."""


THRESHOLDS = Thresholds()
LOWERED = Thresholds(
    attention_queries=4,
    attention_scores=100,
    gate_and_up=500,
    fp8_gate_and_up=500,
    logits=1000,
    product_tiles=1,
    expert_rows=4,
    stays_bytes=16,
    adamw_elements=4096,
    muon_elements=2000,
    norm_row=60,
    base_elements=2000,
    compared_elements=70,
    bucket_elements=3000,
    host_page_bytes=1 << 10,
    gpu_page_bytes=1 << 12,
    staging_bytes=1 << 12,
)
"""The sizes in a proof: smaller than most tensors of a miniature, and mostly no divisors of them."""


@contextmanager
def lowered() -> Iterator[None]:
    """Inside, the sizes of this process are LOWERED. What was made before keeps those it was made with."""
    before = {entry.name: getattr(THRESHOLDS, entry.name) for entry in fields(Thresholds)}
    try:
        vars(THRESHOLDS).update(vars(LOWERED))
        yield
    finally:
        vars(THRESHOLDS).update(before)
