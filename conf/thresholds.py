"""Sizes above which code takes another path, such as a second block, bucket, page or part. All packages use this table.

The sizes affect only speed, not results. mode=prove lowers them in some runs, so that small tensors take both paths.
tests/test_thresholds.py refuses a comparison with a constant in other files. Sizes that are keys of the schema
(`model.loss_chunk`) are not in the table.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields


@dataclass
class Thresholds:
    """Sizes above which code takes another path. Code reads them at each use."""

    attention_queries: int = 128
    """Number of queries in one block of attention. If there are fewer than four blocks, blocks have half as many
    queries. Smaller blocks compute fewer unused scores above the diagonal."""
    attention_scores: int = 1 << 20
    """Number of attention scores that a CPU computes at a time (4 MiB in fp32). It limits how many heads run together,
    so that the scores stay in the cache."""
    gathered_elements: int = 1 << 26
    """Number of gathered elements, or their gradients, that a GPU holds at a time (256 MB in fp32)."""
    gate_and_up: int = 1 << 18
    """Number of elements of [gate | up], the output of the gate and up projections, that are processed at a time. Their
    fp32 copies fit into a CPU's cache."""
    fp8_gate_and_up: int = 1 << 19
    """Number of elements of [gate | up] of FP8 experts that are processed at a time."""
    logits: int = 1 << 18
    """Number of logits that a CPU processes at a time (1 MiB in fp32)."""
    matmul_tiles: int = 400
    """Minimum number of 128x128 tiles of an FP8 grouped GEMM for which a GPU program computes two adjacent tiles. Two
    tiles take an estimated 1.6 times as long as one. With fewer tiles, some of the 132 multiprocessors would be
    idle."""
    expert_rows: int = 32
    """The number of rows of an expert is padded to a multiple of this number. 16 needs more kernels, and 64 needs more
    padding; the speed is the same."""
    stays_bytes: int = 1 << 10
    """Storages of at most this number of bytes are not offloaded."""
    adamw_elements: int = 1 << 18
    """Number of elements that an update processes at a time if moments are bf16. Their fp32 copies stay in the
    cache."""
    muon_elements: int = 1 << 24
    """Maximum elements of matrices that a rank orthogonalises together. A larger matrix is processed alone."""
    norm_row: int = 4096
    """A gradient's norm is computed in rows of this length: sums of squares are fp32 within rows, fp64 over rows."""
    base_elements: int = 1 << 26
    """Maximum number of elements that are quantised together when a frozen base is stored in FP8 blocks (256 MB in
    fp32). A larger matrix is quantised alone."""
    compared_elements: int = 1 << 24
    """Number of weight elements compared at a time with their values before an update (64 MB on the device)."""
    bucket_elements: int = 50_000_000
    """Maximum number of gradient elements that are reduced together."""
    host_page_bytes: int = 1 << 16
    """Page size in bytes of the host store for offloaded activations, on a CPU."""
    gpu_page_bytes: int = 1 << 23
    """Page size in bytes of the host store on a GPU. The copy takes longer than its launch."""
    staging_bytes: int = 1 << 28
    """Bytes of a checkpoint's staging buffer: a power of two, to which page-locked allocations are rounded up."""


THRESHOLDS = Thresholds()
LOWERED = Thresholds(
    attention_queries=4,
    attention_scores=30,
    gathered_elements=100,
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
"""The sizes that mode=prove uses: smaller than most tensors of the miniature model, and mostly not divisors of their
sizes."""


@contextmanager
def lowered() -> Iterator[None]:
    """Context with the LOWERED sizes in this process. Existing objects keep the sizes that they read."""
    before = {entry.name: getattr(THRESHOLDS, entry.name) for entry in fields(Thresholds)}
    try:
        vars(THRESHOLDS).update(vars(LOWERED))
        yield
    finally:
        vars(THRESHOLDS).update(before)
