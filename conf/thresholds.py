"""Sizes above which code takes another path: a second block, bucket, page or part. One table serves all packages.

These sizes affect only speed; results are the same for all values. So mode=prove lowers all sizes in some of its runs.
With lowered sizes, even the small tensors of a proof take both paths. Every such size must be in this table:
tests/test_thresholds.py refuses a comparison with a constant in other files. Sizes that are keys of the schema
(`model.loss_chunk`) are not in the table.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields


@dataclass
class Thresholds:
    """The sizes. Code reads them at each use, so a change takes effect at once."""

    attention_queries: int = 128
    """Number of queries per block of attention. A rectangle of fewer than four blocks uses half of this number, which
    computes fewer useless scores above the diagonal."""
    attention_scores: int = 1 << 20
    """Number of attention scores per block on a CPU (4 MiB in fp32). A block has as many heads as fit, so that its
    scores stay in the cache."""
    gate_and_up: int = 1 << 18
    """Number of elements of [gate | up] that are processed at a time. Their fp32 copies fit into a CPU's cache."""
    fp8_gate_and_up: int = 1 << 19
    """Number of elements of [gate | up] of FP8 experts that are processed at a time, both rows and scales."""
    logits: int = 1 << 18
    """Number of logits that are processed at a time on a CPU (1 MiB in fp32)."""
    matmul_tiles: int = 400
    """Minimum number of 128x128 tiles of an FP8 grouped GEMM for which each GPU program computes two adjacent tiles.
    Two tiles take an estimated 1.6 times as long as one. With fewer tiles, half as many programs would leave some of
    the 132 multiprocessors idle and save no time."""
    expert_rows: int = 32
    """The number of rows of an expert is padded to a multiple of this number. 16 and 64 are as fast: 16 needs more
    kernels, and 64 needs more padding."""
    stays_bytes: int = 1 << 10
    """Maximum bytes of a storage that stays on the device instead of being offloaded."""
    adamw_elements: int = 1 << 18
    """Number of elements that an update processes at a time if moments are bf16. Their fp32 copies stay in the cache,
    so memory is read and written once."""
    muon_elements: int = 1 << 24
    """Maximum number of matrix elements that a rank orthogonalises at a time. A single matrix may be larger."""
    norm_row: int = 4096
    """Number of elements whose squares are summed in fp32."""
    base_elements: int = 1 << 26
    """Maximum number of elements of a frozen base's matrices that are read and cast to blocks together (256 MB in
    fp32). A single matrix may be larger."""
    compared_elements: int = 1 << 24
    """Number of elements of a weight that are compared at a time with their values before an update (64 MB on the
    device)."""
    bucket_elements: int = 50_000_000
    """Maximum number of gradient elements that are reduced together."""
    host_page_bytes: int = 1 << 16
    """Bytes of a page of the host store if the device is a CPU."""
    gpu_page_bytes: int = 1 << 23
    """Bytes of a page of the host store if the device is a GPU. It is so large that a copy takes longer than its
    launch."""
    staging_bytes: int = 1 << 28
    """Bytes of one staging buffer of a checkpoint. It is a power of two, because page-locked allocations are rounded up
    to powers of two."""


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
"""The sizes that mode=prove uses. They are smaller than most tensors of a miniature, and mostly do not divide the
tensors' sizes."""


@contextmanager
def lowered() -> Iterator[None]:
    """Use the LOWERED sizes in this process inside the block. Objects that were built before the block do not change
    their sizes."""
    before = {entry.name: getattr(THRESHOLDS, entry.name) for entry in fields(Thresholds)}
    try:
        vars(THRESHOLDS).update(vars(LOWERED))
        yield
    finally:
        vars(THRESHOLDS).update(before)
