"""GPU kernels for the rows of dispatch and combine. Their results are bitwise equal to permute.py's and wire.py's.

    count_hits, place_hits      build a fan-out to targets, from the experts of each source
    place_entries               builds a fan-out to experts, and the inverse map for combine
    collect, sum_entries        sum every source's copies in fp32 and round once
    encode_rows                 encodes rows as the bytes of the FP8 wire

No kernel waits for the host. Shapes are those of permute.py and wire.py; `row` is the stride between message rows, in
elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.triton_types import constexpr, power_of_2_from, quick, with_options

HITS = 4096
"""Maximum of sources times targets in one program of a kernel."""
COUNT_BLOCKS = 64
"""Number of source blocks whose counts are added in one iteration."""
COLLECT_COLUMNS = 1024
"""Columns in one program of `collect`: eight values per thread."""
ENCODE_ROWS, ENCODE_TILES = 8, 4
"""Rows and tiles in one program of `encode_rows`: the exponents of four tiles form a 32-bit word."""


@triton.jit
def _hits(ids_ptr, sources, number, first, per_target, K: constexpr, TARGETS: constexpr):
    """Return int32 (sources, TARGETS): the index k of the source's last expert in the target, or -1."""
    target = tl.arange(0, TARGETS)[None, :]
    entry = tl.full((sources.shape[0], TARGETS), -1, tl.int32)
    for k in tl.static_range(K):
        id = tl.load(ids_ptr + sources.to(tl.int64) * K + k, sources < number, -1).to(tl.int32) - first
        wanted = tl.where(id >= 0, id // per_target, -1)[:, None]
        entry = tl.where(wanted == target, k, entry)
    return entry


@quick
@triton.jit(do_not_specialize=["number"])
def _count_kernel(
    ids_ptr, counts_ptr, number, first, per_target, targets,
    K: constexpr, TARGETS: constexpr, SOURCES: constexpr,
):  # fmt: skip
    sources = tl.program_id(0) * SOURCES + tl.arange(0, SOURCES)
    hit = (_hits(ids_ptr, sources, number, first, per_target, K, TARGETS) >= 0).to(tl.int32)
    target = tl.arange(0, TARGETS)
    tl.store(counts_ptr + tl.program_id(0) * targets + target, tl.sum(hit, axis=0), target < targets)


@quick
@triton.jit(do_not_specialize=["number", "blocks"])
def _place_kernel(
    ids_ptr, counts_ptr, source_ptr, copy_ptr, start_ptr, entry_ptr, number, first, per_target, targets, blocks,
    by_entry: constexpr, K: constexpr, TARGETS: constexpr, SOURCES: constexpr, COUNT_BLOCKS: constexpr,
):  # fmt: skip
    """Compute the fields of a FanOut. An entry is one element of the flattened expert ids.

    source_ptr: receives the source of each copy
    entry_ptr: receives the index of each copy's entry
    copy_ptr: receives the indices of all copies, ordered by source; if by_entry, each entry's copy
    start_ptr: receives each source's start in copy_ptr; if by_entry, the number of copies of each target
    """
    block = tl.program_id(0)
    sources = block * SOURCES + tl.arange(0, SOURCES)
    entry = _hits(ids_ptr, sources, number, first, per_target, K, TARGETS)
    target = tl.arange(0, TARGETS)
    before, totals = tl.zeros((TARGETS,), tl.int32), tl.zeros((TARGETS,), tl.int32)
    for start in range(0, blocks, COUNT_BLOCKS):
        b = start + tl.arange(0, COUNT_BLOCKS)[:, None]
        counts = tl.load(counts_ptr + b * targets + target[None, :], (b < blocks) & (target < targets)[None, :], 0)
        before += tl.sum(tl.where(b < block, counts, 0), axis=0)
        totals += tl.sum(counts, axis=0)
    first_place = tl.cumsum(totals, axis=0) - totals + before
    hit = (entry >= 0) & (target < targets)[None, :]
    ones = hit.to(tl.int32)
    place = first_place[None, :] + tl.cumsum(ones, axis=0) - ones
    listed = sources[:, None] * K + entry
    tl.store(source_ptr + place, tl.broadcast_to(sources[:, None], hit.shape).to(tl.int64), hit)
    tl.store(entry_ptr + place, listed.to(tl.int64), hit)
    if by_entry:
        tl.store(start_ptr + target, totals.to(tl.int64), target < tl.where(block == 0, targets, 0))
    else:
        of_source = tl.sum(ones, axis=1)
        start = tl.sum(before, axis=0) + tl.cumsum(of_source, axis=0) - of_source
        listed = start[:, None] + tl.cumsum(ones, axis=1) - ones
        tl.store(start_ptr + sources, start.to(tl.int64), sources < number)
    tl.store(copy_ptr + listed, place.to(tl.int64), hit)


@quick
@triton.jit(do_not_specialize=["sources", "copies"])
def _collect_kernel(
    rows_ptr, copy_ptr, start_ptr, out_ptr, sources, copies, width, row, out_row, each: constexpr, COLLECT_COLUMNS: constexpr
):  # fmt: skip
    """Sum the copies of every source.

    each: number of copies per source; 0 if it varies. Then start_ptr has each source's start.
    """
    source = tl.program_id(0)
    columns = tl.program_id(1) * COLLECT_COLUMNS + tl.arange(0, COLLECT_COLUMNS)
    first, last = source * each, source * each + each
    if each == 0:
        first = tl.load(start_ptr + source)
        last = tl.load(start_ptr + source + 1, source + 1 < sources, copies)
    total = tl.zeros((COLLECT_COLUMNS,), tl.float32)
    for place in range(first, last):
        copy = tl.load(copy_ptr + place)
        total += tl.load(rows_ptr + copy * row + columns, columns < width, 0.0).to(tl.float32)
    tl.store(out_ptr + source.to(tl.int64) * out_row + columns, total, columns < width)


@quick
@triton.jit(do_not_specialize=["rows_R"])
def _encode_kernel(
    x_ptr, bytes_ptr, words_ptr, rows_R, width, tiles, units, floor: constexpr,
    ALIGN: constexpr, ENCODE_ROWS: constexpr, ENCODE_TILES: constexpr,
):  # fmt: skip
    """Run `Fp8Wire.encode` for four tiles of some rows. A row has units * ALIGN bytes."""
    rows = tl.program_id(0) * ENCODE_ROWS + tl.arange(0, ENCODE_ROWS)
    first = tl.program_id(1) * ENCODE_TILES
    columns = first * 128 + tl.arange(0, ENCODE_TILES * 128)
    there = (rows < rows_R)[:, None] & (columns < width)[None, :]
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * width + columns[None, :], there, 0.0).to(tl.float32)
    x = tl.reshape(x, (ENCODE_ROWS, ENCODE_TILES, 128))
    amax = tl.maximum(tl.max(tl.abs(x), axis=2), floor)
    exponent = ((amax.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    q = tl.clamp(x * inverse[:, :, None], -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)
    q = tl.reshape(q, (ENCODE_ROWS, ENCODE_TILES * 128)).to(tl.uint8, bitcast=True)
    place = rows[:, None].to(tl.int64) * (units * ALIGN)
    tl.store(bytes_ptr + place + columns[None, :], q, there)
    tile = tl.arange(0, ENCODE_TILES)[None, :]
    word = tl.sum(tl.where(first + tile < tiles, (exponent & 0xFF) << (8 * tile), 0), axis=1)
    tl.store(
        words_ptr + rows.to(tl.int64) * (units * (ALIGN // 4)) + width // 4 + tl.program_id(1), word, rows < rows_R
    )


def count_hits(ids_SK: Tensor, first: int, per_target: int, targets: int) -> Tensor:
    """Return, by block of sources, how many sources have an expert in each target: int32 (blocks, targets)."""
    (sources, entries), size = ids_SK.shape, _sources(targets)
    blocks = -(-sources // size)
    counts_BN = ids_SK.new_empty(blocks, targets, dtype=torch.int32)
    if sources:
        _count_kernel[(blocks,)](
            ids_SK.contiguous(), counts_BN, sources, first, per_target, targets,
            entries, power_of_2_from(targets), size,
        )  # fmt: skip
    return counts_BN


def place_hits(
    ids_SK: Tensor, first: int, per_target: int, targets: int, copies: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return int64 tensors: the fields of a FanOut, and each copy's index in the flattened ids_SK."""
    start_S = ids_SK.new_empty(len(ids_SK), dtype=torch.int64)
    source_C, copy_C, entry_C = _place(ids_SK, first, per_target, targets, copies, start_S, by_entry=False)
    return source_C, copy_C, start_S, entry_C


def place_entries(ids_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Implements `train.model.operations.Kernels.sort_by_expert`. The experts of a token are distinct."""
    counts_E = ids_TK.new_empty(experts) if len(ids_TK) else ids_TK.new_zeros(experts)
    tokens_R, inverse_R, order_R = _place(ids_TK, 0, 1, experts, ids_TK.numel(), counts_E, by_entry=True)
    return order_R, inverse_R, tokens_R, counts_E


def _place(
    ids_SK: Tensor, first: int, per_target: int, targets: int, copies: int, start: Tensor, by_entry: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensors that `_place_kernel` writes at source_ptr, copy_ptr and entry_ptr."""
    ids_SK = ids_SK.contiguous()
    counts_BN = count_hits(ids_SK, first, per_target, targets)
    source_C, copy_C, entry_C = (ids_SK.new_empty(copies, dtype=torch.int64) for _ in range(3))
    (sources, entries), blocks = ids_SK.shape, counts_BN.shape[0]
    if sources:
        with_options(_place_kernel[(blocks,)], num_warps=8)(
            ids_SK, counts_BN, source_C, copy_C, start, entry_C, sources, first, per_target, targets, blocks,
            by_entry, entries, power_of_2_from(targets), _sources(targets), COUNT_BLOCKS,
        )  # fmt: skip
    return source_C, copy_C, entry_C


def collect(rows_CX: Tensor, copy_C: Tensor, start_S: Tensor, out_SX: Tensor) -> None:
    """Sum every source's copies. Input and output rows may be strided."""
    _collect(rows_CX, copy_C, start_S, out_SX, 0)


def sum_entries(rows_CX: Tensor, copy_SK: Tensor, out_SX: Tensor) -> None:
    """Sum every source's K copies in the order of copy_SK."""
    _collect(rows_CX, copy_SK, copy_SK, out_SX, copy_SK.shape[1])


def _collect(rows_CX: Tensor, copy_C: Tensor, start_S: Tensor, out_SX: Tensor, each: int) -> None:
    sources, width = out_SX.shape
    if out_SX.numel():
        _collect_kernel[(sources, -(-width // COLLECT_COLUMNS))](
            rows_CX, copy_C, start_S, out_SX, sources, copy_C.numel(), width, rows_CX.stride(0), out_SX.stride(0),
            each, COLLECT_COLUMNS,
        )  # fmt: skip


def encode_rows(x_RD: Tensor, bytes_RB: Tensor, floor: float) -> None:
    """Encode rows as bytes of `Fp8Wire`. The width must be a multiple of 128."""
    (rows, width), row = x_RD.shape, bytes_RB.shape[1]
    tiles, words = width // 128, bytes_RB.view(torch.int32)
    align = row & -row
    if bytes_RB.numel():
        _encode_kernel[(-(-rows // ENCODE_ROWS), -(-tiles // ENCODE_TILES))](
            x_RD.contiguous(),
            bytes_RB,
            words,
            rows,
            width,
            tiles,
            row // align,
            floor,
            align,
            ENCODE_ROWS,
            ENCODE_TILES,
        )


def _sources(targets: int) -> int:
    """Return the number of sources that one program handles."""
    return max(1, min(128, HITS // power_of_2_from(targets)))
