"""Sizes above which code takes another path, such as a second block, bucket, page or part. All packages use this table.

The sizes affect only speed; results are the same for all values. mode=prove lowers all sizes in some of its runs, so
that even its small tensors take both paths. Every such size must be in this table: tests/test_thresholds.py refuses a
comparison with a constant in other files. Sizes that are keys of the schema (`model.loss_chunk`) are not in the table.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields


@dataclass
class Thresholds:
    """The sizes above which code takes another path. Code reads a size at each use, so a change takes effect at
    once."""

    attention_queries: int = 128
    """Number of queries that attention processes at a time, as one block. If a range has fewer queries than four
    blocks, the blocks have half as many queries. Smaller blocks compute fewer of the scores above the diagonal, which
    are not used."""
    attention_scores: int = 1 << 20
    """Number of attention scores that a CPU computes at a time (4 MiB in fp32). Code takes as many attention heads
    together as this limit allows, so that the scores stay in the cache."""
    gathered_elements: int = 1 << 26
    """Number of elements of gathered rows, or of their gradients, that a GPU holds at a time (256 MB in fp32)."""
    gate_and_up: int = 1 << 18
    """Number of elements of [gate | up], the output of the gate and up projections, that are processed at a time. Their
    fp32 copies fit into a CPU's cache."""
    fp8_gate_and_up: int = 1 << 19
    """Number of elements of [gate | up], the output of the gate and up projections of FP8 experts, that are processed
    at a time."""
    logits: int = 1 << 18
    """Number of logits that are processed at a time on a CPU (1 MiB in fp32)."""
    matmul_tiles: int = 400
    """Minimum number of 128x128 tiles of an FP8 grouped GEMM for which each GPU program computes two adjacent tiles.
    Two tiles take an estimated 1.6 times as long as one. With fewer tiles, programs for pairs would leave some of the
    132 multiprocessors idle, and save no time."""
    expert_rows: int = 32
    """The number of rows of an expert is padded to a multiple of this number. With 16, 32 and 64 the speed is the same,
    but 16 needs more kernels than 32, and 64 needs more padding."""
    stays_bytes: int = 1 << 10
    """A storage of at most this number of bytes stays on the device and is not offloaded."""
    adamw_elements: int = 1 << 18
    """Number of elements that an update processes at a time if moments are bf16. The fp32 copies of these elements stay
    in the cache, so memory is read and written only once."""
    muon_elements: int = 1 << 24
    """Maximum number of matrix elements that a rank orthogonalises at a time. A single matrix may be larger."""
    norm_row: int = 4096
    """The norm of a gradient is computed in rows of this number of elements. Squares are summed in fp32 within a row,
    and in fp64 over the rows."""
    base_elements: int = 1 << 26
    """Maximum number of weight elements that are read and quantised together, when a frozen base is stored in FP8
    blocks (256 MB in fp32). A single matrix may be larger."""
    compared_elements: int = 1 << 24
    """Number of elements of a weight that are compared at a time with their values before the update (64 MB on the
    device)."""
    bucket_elements: int = 50_000_000
    """Maximum number of gradient elements that are reduced together."""
    host_page_bytes: int = 1 << 16
    """Bytes of a page of the host store, which holds offloaded activations, if the device is a CPU."""
    gpu_page_bytes: int = 1 << 23
    """Bytes of a page of the host store, which holds offloaded activations, if the device is a GPU. With this size, the
    copy of a page takes longer than the launch of the copy."""
    staging_bytes: int = 1 << 28
    """Bytes of one staging buffer of a checkpoint. It is a power of two, because page-locked allocations are rounded up
    to powers of two."""


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
"""The sizes that mode=prove uses. They are smaller than most tensors of the miniature model, and mostly do not divide
the sizes of these tensors."""


@contextmanager
def lowered() -> Iterator[None]:
    """Context in which this process uses the LOWERED sizes. An object that was built before keeps the sizes that it
    read."""
    before = {entry.name: getattr(THRESHOLDS, entry.name) for entry in fields(Thresholds)}
    try:
        vars(THRESHOLDS).update(vars(LOWERED))
        yield
    finally:
        vars(THRESHOLDS).update(before)
