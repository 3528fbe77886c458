"""Sizes above which code takes another path: a second block, bucket, page or piece. One table for all packages.

They affect only speed; results are the same for all values. So mode=prove lowers all of them in some runs, where even
its small tensors take both paths. Every such size must be in this table: tests/test_thresholds.py refuses a comparison
with a constant elsewhere. Sizes that are keys of the schema (`model.loss_chunk`) are not in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields


@dataclass
class Thresholds:
    """Sizes of the paths. Code reads them at each use, so a change takes effect at once."""

    attention_queries: int = 128
    """Queries per block of attention; half as many in a rectangle below four blocks, to waste less above the
    diagonal."""
    attention_scores: int = 1 << 20
    """Scores per block on a CPU, in fp32 4 MiB: as many heads as fit, so that the scores stay in the cache."""
    gate_and_up: int = 1 << 18
    """Elements of [gate | up] whose fp32 copies stay in a CPU's cache."""
    fp8_gate_and_up: int = 1 << 19
    """Elements of [gate | up] of FP8 experts at a time, whose rows and scales are processed together."""
    logits: int = 1 << 18
    """Logits in fp32 at a time on a CPU: 1 MiB."""
    matmul_tiles: int = 400
    """Number of 128x128 tiles of an FP8 grouped GEMM from which a GPU program computes two adjacent tiles. Two tiles
    take an estimated 1.6 times as long. Below this number, half as many programs would leave some of 132
    multiprocessors idle and save no time."""
    expert_rows: int = 32
    """The rows of an expert are padded to a multiple of this number. 16 and 64 are as fast: more kernels, or more
    padding."""
    stays_bytes: int = 1 << 10
    """Bytes of the largest storage that is not offloaded."""
    adamw_elements: int = 1 << 18
    """Elements per update piece if moments are bf16: their fp32 copies stay in the cache, so memory is read and written
    once."""
    muon_elements: int = 1 << 24
    """Maximum elements of matrices that a rank orthogonalises at a time, except for a single larger matrix."""
    norm_row: int = 4096
    """Elements whose squares are summed in fp32."""
    base_elements: int = 1 << 26
    """Maximum elements of a frozen base's matrices that are read into blocks together, except for a single larger
    matrix: 256 MB in fp32."""
    compared_elements: int = 1 << 24
    """Elements of a weight that are compared at a time with their values before an update: 64 MB on the device."""
    bucket_elements: int = 50_000_000
    """Maximum number of gradient elements that are reduced together."""
    host_page_bytes: int = 1 << 16
    """Bytes of a page of the host store for a CPU."""
    gpu_page_bytes: int = 1 << 23
    """Bytes of a page for a GPU: large enough that a copy takes longer than its launch."""
    staging_bytes: int = 1 << 28
    """Bytes of one staging buffer of a checkpoint. A power of two, because page-locked allocations are rounded up to
    powers of two."""


THRESHOLDS = Thresholds()
LOWERED = Thresholds(
    attention_queries=4,
    attention_scores=100,
    gate_and_up=500,
    fp8_gate_and_up=500,
    logits=1000,
    matmul_tiles=1,
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
"""The sizes in mode=prove: smaller than most tensors of a miniature, and mostly not divisors of their sizes."""


@contextmanager
def lowered() -> Iterator[None]:
    """Use the LOWERED sizes in this process inside the block. Objects built before keep the sizes of their
    construction."""
    before = {entry.name: getattr(THRESHOLDS, entry.name) for entry in fields(Thresholds)}
    try:
        vars(THRESHOLDS).update(vars(LOWERED))
        yield
    finally:
        vars(THRESHOLDS).update(before)
