"""Sizes above which code takes another path: for example, it then uses several blocks, buckets or pages.

The sizes affect only speed, not results. mode=prove lowers them so that its small tensors test both paths.
tests/test_thresholds.py refuses such constants in other files.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields


@dataclass
class Thresholds:
    """Sizes above which code takes another path, read at each use."""

    attention_queries: int = 128
    """Number of queries in one block of attention, halved if there are fewer than four blocks."""
    attention_scores: int = 1 << 20
    """Number of attention scores that a CPU computes at a time (4 MiB in fp32)."""
    gathered_elements: int = 1 << 26
    """Number of gathered elements, or of gradient elements, that a GPU holds at a time (256 MB)."""
    gate_and_up: int = 1 << 18
    """Number of elements of gate and up projections that are processed at a time. Their fp32 copies fit into a CPU's
    cache."""
    fp8_gate_and_up: int = 1 << 19
    """Number of elements of FP8 experts' gate and up projections that are processed at a time."""
    logits: int = 1 << 18
    """Number of logits that a CPU processes at a time (1 MiB in fp32)."""
    matmul_tiles: int = 400
    """Minimum number of 128x128 tiles of an FP8 grouped GEMM for which a GPU program computes two adjacent tiles. With
    fewer tiles, some of the 132 multiprocessors would be idle."""
    expert_rows: int = 32
    """An expert's rows are padded to a multiple of this number. 16 needs more kernels, 64 more padding."""
    stays_bytes: int = 1 << 10
    """Storages of at most this number of bytes are not offloaded."""
    adamw_elements: int = 1 << 18
    """Number of elements that an update with bf16 moments processes at a time. Their fp32 copies stay in the cache."""
    muon_elements: int = 1 << 24
    """Maximum elements of matrices that a rank orthogonalises together. A larger matrix is processed alone."""
    norm_row: int = 4096
    """Row length for the norm of a gradient: sums of squares are fp32 within rows, fp64 over rows."""
    base_elements: int = 1 << 26
    """Maximum elements of frozen weights quantised together (256 MB in fp32). A larger matrix is quantised alone."""
    compared_elements: int = 1 << 24
    """Number of weight elements that are compared at a time with their values before an update."""
    bucket_elements: int = 50_000_000
    """Maximum number of gradient elements that are reduced together."""
    host_page_bytes: int = 1 << 16
    """Page size in bytes of a CPU's host store for offloaded activations."""
    gpu_page_bytes: int = 1 << 23
    """Page size in bytes of a GPU's host store for offloaded activations."""
    staging_bytes: int = 1 << 28
    """Bytes of a checkpoint's staging buffer, a power of two for page-locked memory."""


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
"""Thresholds of mode=prove: smaller than most tensors of its miniature model, and mostly no divisors of the tensors'
sizes."""


@contextmanager
def lowered() -> Iterator[None]:
    """Context manager that sets the sizes in LOWERED. Existing objects keep the sizes that they read."""
    before = {entry.name: getattr(THRESHOLDS, entry.name) for entry in fields(Thresholds)}
    try:
        vars(THRESHOLDS).update(vars(LOWERED))
        yield
    finally:
        vars(THRESHOLDS).update(before)
