"""Quantisation kernels for CUDA, bitwise equal to `quantize` in q and scale.

Each kernel reads its input once. It writes FP8 values and fp32 scales in the layout that the next GEMM reads:

    quantize_tiles      (R, C) -> q (P, C), a scale per row and 128 columns        left operands
    quantize_columns    (R, C) -> q^T (C, P), a scale per column and 128 rows      both operands of Wgrad
    quantize_both       (R, C) -> both of these                                    a gradient, for Dgrad and Wgrad
    quantize_again      quantize_columns of the result of quantize_tiles           an unquantised saved input, for Wgrad
    quantize_blocks     (R, C) -> q (R, C) or (C, R), a scale per 128x128          weights
    quantize_e5m6       (R, C) -> q (P, 3 C / 2), twelve bits per value            an input saved more precisely
    decode_e5m6         E5M6 codes -> their values in bf16                         input of attention's backward
    swiglu_tiles        quantize_tiles of SwiGLU's output, and of its input h      the down-projection
    swiglu_backward     a, dh and dw from h and da                                 see train/kernels/fp8/swiglu.py
    quantize_mx         (R, C) -> q (P, Q), a scale per row and 32 columns         every MXFP8 operand

The input of `quantize_columns` may be quantised, so one pass converts a saved input to 128x1 tiles for Wgrad (paper
3.5.2). Divisions are IEEE divisions (`div_rn`), because `/` is approximate on NVIDIA GPUs.

The number of columns must be a multiple of 128, and for weights also the number of rows; the caller pads. Activations
may have any number of rows. Missing rows of the last tile count as zeros, and are written only if a GEMM reads them.

Only `quantize_mx` accepts any strides and sizes. It writes E8M0 scales in the layout of Blackwell's GEMMs (cuBLAS 13,
"1D Block Scaling Factors Layout"). An E8M0 scale is a byte: the exponent of a power of two, plus 127. A block of 128
rows by 4 scales has 512 bytes; the scales of row r begin at byte 16 (r mod 32) + 4 (r div 32). Blocks of the same rows
are adjacent, in the order of the contraction.

The module needs triton. Shape suffixes: R rows, P rows of whole tiles, C columns, Q columns of whole tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.triton_types import constexpr, power_of_2_from, quick, with_options
from train.kernels.fp8.formats import TILE, Cast, empty_scales
from train.kernels.fp8.groups import most_tiles, on_device

QUANTIZE_ROWS = 32
"""Number of rows that a program quantises."""
BACKWARD_ROWS = 8
"""Number of rows that a program of `swiglu_backward` processes. The number of registers limits it."""
QUANTIZE_COLUMNS = 32
"""Number of columns that a program of `quantize_columns` quantises."""


@triton.jit
def _scales(amax, maximum: constexpr, floor: constexpr, pow2: constexpr):
    """Returns scale and inverse for a max-abs, like `train.kernels.fp8.quantize.scales`."""
    amax = tl.maximum(amax, floor)
    scale = tl.div_rn(amax, tl.full(amax.shape, maximum, tl.float32))
    if pow2:
        bits = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = bits.to(tl.float32, bitcast=True)
        inverse = tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), scale)
    else:
        inverse = tl.div_rn(tl.full(amax.shape, maximum, tl.float32), amax)
    return scale, inverse


@triton.jit
def _cast(scaled, maximum: constexpr, dtype: constexpr):
    """Clamp and round values to the format; NaN stays NaN."""
    return tl.clamp(scaled, -maximum, maximum, propagate_nan=tl.PropagateNan.ALL).to(dtype)


@triton.jit
def tiles_of_experts(ends_ptr, experts: constexpr, slots: constexpr, least: constexpr = 0):
    """Returns the end of each expert's rows, and each expert's number of tiles of 128 rows. least: minimum number of
    tiles per expert.

    The results have `slots` entries, a power of two. Entries after the last expert have 0 tiles.
    """
    slot = tl.arange(0, slots)
    end = tl.load(ends_ptr + slot, mask=slot < experts, other=0)
    start = tl.load(ends_ptr + slot - 1, mask=(slot > 0) & (slot < experts), other=0)
    return end, tl.where(slot < experts, tl.maximum((end - start + 127) // 128, least), 0)


@triton.jit
def rows_of_tile(ends_ptr, tile, height, experts: constexpr, slots: constexpr, least: constexpr = 0):
    """Returns a tile's expert, the tile's first row, and the end of the expert's rows. Tiles past the last expert are
    empty.
    """
    expert, first, last = 0, tile * 128, height
    if experts > 1:
        end, tiles = tiles_of_experts(ends_ptr, experts, slots, least)
        before = tl.cumsum(tiles, axis=0) <= tile
        expert = before.to(tl.int32).sum()
        start = tl.max(tl.where(before, end, 0))
        first = start + (tile - tl.sum(tl.where(before, tiles, 0))) * 128
        last = tl.load(ends_ptr + expert, mask=expert < experts, other=0)
    return expert, first, last


@triton.jit
def _load(x_ptr, scale_ptr, rows, last, columns, tile, width, scale_rows, scaled: constexpr):
    """Load fp32 values at rows x columns of one tile of 128 columns. Values from row `last` on are zero.

    scaled: whether the input is FP8 with a scale per row and tile.
    """
    there = rows < last
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * width + columns[None, :], there[:, None], 0.0).to(tl.float32)
    if scaled:
        x *= tl.load(scale_ptr + tile * scale_rows + rows, there, 0.0)[:, None]
    return x


@triton.jit
def _store_tiles(
    x, q_ptr, scale_ptr, rows, columns, there, tile, width, scale_rows,
    maximum: constexpr, floor: constexpr, pow2: constexpr,
):  # fmt: skip
    """Store values at rows x columns of a tile of 128 columns as FP8, with a scale per row."""
    scale, inverse = _scales(tl.max(tl.abs(x), axis=1), maximum, floor, pow2)
    q = _cast(x * inverse[:, None], maximum, q_ptr.dtype.element_ty)
    tl.store(q_ptr + rows[:, None].to(tl.int64) * width + columns[None, :], q, there[:, None])
    tl.store(scale_ptr + tile * scale_rows + rows, scale, there)


@quick
@triton.jit(do_not_specialize=["height"])
def _tiles_kernel(
    x_ptr, q_ptr, scale_ptr, height, width, height_out,
    maximum: constexpr, floor: constexpr, pow2: constexpr, block: constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * block + tl.arange(0, block)
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)
    tile = tl.program_id(1)
    x = _load(x_ptr, x_ptr, rows, height, columns, tile, width, height, False)
    _store_tiles(x, q_ptr, scale_ptr, rows, columns, rows < height_out, tile, width, height_out, maximum, floor, pow2)


@quick
@triton.jit(do_not_specialize=["height"])
def _e5m6_kernel(
    x_ptr, q_ptr, scale_ptr, height, width, height_out,
    maximum: constexpr, floor: constexpr, pow2: constexpr, block: constexpr,
):  # fmt: skip
    """Packs eight values into three 32-bit integers, bitwise as `train.kernels.fp8.formats.pack_e5m6`."""
    rows = tl.program_id(0) * block + tl.arange(0, block)
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)
    x = _load(x_ptr, x_ptr, rows, height, columns, 0, width, height, False)
    scale, inverse = _scales(tl.max(tl.abs(x), axis=1), maximum, floor, pow2)
    x = tl.clamp(x * inverse[:, None], -maximum, maximum, propagate_nan=tl.PropagateNan.ALL)
    # Round like `formats.round_to`; a step is the distance between E5M6 values at x.
    step = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 113 << 23) + ((17 << 23) + 0x400000)
    x = (x + step.to(tl.float32, bitcast=True)) - step.to(tl.float32, bitcast=True)
    codes = (x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) >> 4) & 0xFFF
    even, odd = tl.split(tl.reshape(codes, (block, 64, 2)))
    pairs = even | (odd << 12)  # 24 bits in each integer
    even, odd = tl.split(tl.reshape(pairs, (block, 32, 2)))
    first, third = tl.split(tl.reshape(even, (block, 16, 2)))
    second, fourth = tl.split(tl.reshape(odd, (block, 16, 2)))
    words = rows[:, None].to(tl.int64) * (width // 8 * 3) + tl.program_id(1) * 48 + tl.arange(0, 16)[None, :] * 3
    tl.store(q_ptr + words, first | (second << 24))
    tl.store(q_ptr + words + 1, ((second >> 8) & 0xFFFF) | (third << 16))
    tl.store(q_ptr + words + 2, ((third >> 16) & 0xFF) | (fourth << 8))
    tl.store(scale_ptr + tl.program_id(1) * height_out + rows, scale)


@triton.jit
def _load_e5m6(q_ptr, scale_ptr, rows, start, tile, width, height, count: constexpr):
    """Returns fp32 values of `count` E5M6 columns from `start` on, in these rows of one tile."""
    words = rows[:, None].to(tl.int64) * (width // 8 * 3) + (start // 8 + tl.arange(0, count // 8))[None, :] * 3
    low, middle, high = tl.load(q_ptr + words), tl.load(q_ptr + words + 1), tl.load(q_ptr + words + 2)
    first = low & 0xFFFFFF
    second = ((low >> 24) & 0xFF) | ((middle & 0xFFFF) << 8)
    third = ((middle >> 16) & 0xFFFF) | ((high & 0xFF) << 16)
    fourth = (high >> 8) & 0xFFFFFF
    size: constexpr = rows.shape[0]
    even = tl.reshape(tl.join(first, third), (size, count // 4))
    odd = tl.reshape(tl.join(second, fourth), (size, count // 4))
    pairs = tl.reshape(tl.join(even, odd), (size, count // 2))
    codes = tl.reshape(tl.join(pairs & 0xFFF, pairs >> 12), (size, count))
    x = (codes << 4).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return x * tl.load(scale_ptr + tile * height + rows)[:, None]


@quick
@triton.jit(do_not_specialize=["height"])
def _columns_kernel(
    x_ptr, in_scale_ptr, q_ptr, scale_ptr, base_ptr, stride_ptr, ends_ptr, height, width, height_out,
    maximum: constexpr, floor: constexpr, pow2: constexpr, scaled: constexpr, packed: constexpr,
    flat: constexpr, experts: constexpr, slots: constexpr, block: constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    _, first, last = rows_of_tile(ends_ptr, tile, height, experts, slots)
    rows = first + tl.arange(0, 128)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    if packed:
        start = tl.program_id(1) * block
        x = _load_e5m6(x_ptr, in_scale_ptr, rows, start, start // 128, width, height, block)
    else:
        x = _load(x_ptr, in_scale_ptr, rows, last, columns, tl.program_id(1) * block // 128, width, height, scaled)
    scale, inverse = _scales(tl.max(tl.abs(x), axis=0), maximum, floor, pow2)
    q = _cast(x * inverse[None, :], maximum, q_ptr.dtype.element_ty)
    base, stride = tile * 128, tl.cast(height_out, tl.int64)
    if flat:  # multiples of 128; without this hint the compiler stores single bytes
        base, stride = tl.multiple_of(tl.load(base_ptr + tile), 128), tl.multiple_of(tl.load(stride_ptr + tile), 128)
    tl.store(q_ptr + base + columns[:, None] * stride + tl.arange(0, 128)[None, :], tl.trans(q))
    tl.store(scale_ptr + tile * width + columns, scale)


@quick
@triton.jit(do_not_specialize=["height", "rows_out"])
def _both_kernel(
    x_ptr, q_ptr, scale_ptr, q_t_ptr, scale_t_ptr, ends_ptr, height, width, rows_out, columns_out,
    maximum: constexpr, floor: constexpr, pow2: constexpr,
    maximum_t: constexpr, floor_t: constexpr, pow2_t: constexpr, again: constexpr, experts: constexpr, slots: constexpr,
):  # fmt: skip
    """Computes what `_tiles_kernel` and `_columns_kernel` compute, for 128 rows and 128 columns.

    again: whether to apply the second cast to the result of the first cast. The first result is then not stored.
    """
    tile = tl.program_id(0)
    _, first, last = rows_of_tile(ends_ptr, tile, height, experts, slots)
    rows = first + tl.arange(0, 128)
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)
    x = _load(x_ptr, x_ptr, rows, last, columns, 0, width, height, False)
    if again:
        scale, inverse = _scales(tl.max(tl.abs(x), axis=1), maximum, floor, pow2)
        x = _cast(x * inverse[:, None], maximum, q_ptr.dtype.element_ty).to(tl.float32) * scale[:, None]
    else:
        written = rows < (last if experts > 1 else rows_out)
        tile_n = tl.program_id(1)
        _store_tiles(x, q_ptr, scale_ptr, rows, columns, written, tile_n, width, rows_out, maximum, floor, pow2)
    scale, inverse = _scales(tl.max(tl.abs(x), axis=0), maximum_t, floor_t, pow2_t)
    q = _cast(x * inverse[None, :], maximum_t, q_t_ptr.dtype.element_ty)
    place = columns[:, None] * tl.cast(columns_out, tl.int64) + tile * 128 + tl.arange(0, 128)[None, :]
    tl.store(q_t_ptr + place, tl.trans(q))
    tl.store(scale_t_ptr + tile * width + columns, scale)


@quick
@triton.jit(do_not_specialize=["height"])
def _decode_kernel(q_ptr, scale_ptr, out_ptr, height, width, scale_rows, block: constexpr):
    rows = tl.program_id(0) * block + tl.arange(0, block)
    start = tl.program_id(1) * 128
    x = _load_e5m6(q_ptr, scale_ptr, rows, start, tl.program_id(1), width, scale_rows, 128)
    place = rows[:, None].to(tl.int64) * width + start + tl.arange(0, 128)[None, :]
    tl.store(out_ptr + place, x.to(tl.bfloat16), (rows < height)[:, None])


@quick
@triton.jit
def _blocks_kernel(
    x_ptr, q_ptr, scale_ptr, height, width, q_row, q_column, scale_row, scale_column, q_matrix, scale_matrix,
    maximum: constexpr, floor: constexpr, pow2: constexpr,
    transposed: constexpr,
):  # fmt: skip
    matrix = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * 128 + tl.arange(0, 128)
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)
    x = _load(x_ptr + matrix * height * width, x_ptr, rows, height, columns, 0, width, height, False)
    scale, inverse = _scales(
        tl.max(tl.max(tl.abs(x), axis=1, keep_dims=True), axis=0, keep_dims=True), maximum, floor, pow2
    )
    q = _cast(x * inverse, maximum, q_ptr.dtype.element_ty)
    q_ptr += matrix * q_matrix
    if transposed:
        tl.store(q_ptr + columns[:, None].to(tl.int64) * q_column + rows[None, :] * q_row, tl.trans(q))
    else:
        tl.store(q_ptr + rows[:, None].to(tl.int64) * q_row + columns[None, :] * q_column, q)
    place = tl.program_id(0) * scale_row + tl.program_id(1) * scale_column + tl.zeros((1, 1), tl.int32)
    tl.store(scale_ptr + matrix * scale_matrix + place, scale)


@quick
@triton.jit(do_not_specialize=["height"])
def _swiglu_kernel(
    h_ptr, gates_ptr, q_ptr, scale_ptr, kept_ptr, kept_scale_ptr, height, width,
    maximum: constexpr, floor: constexpr, pow2: constexpr,
    kept_maximum: constexpr, kept_floor: constexpr, kept_pow2: constexpr, block: constexpr,
):  # fmt: skip
    rows, tile = tl.program_id(0) * block + tl.arange(0, block), tl.program_id(1)
    there, columns = rows < height, tile * 128 + tl.arange(0, 128)
    gate = _load(h_ptr, h_ptr, rows, height, columns, 0, 2 * width, height, False)
    up = _load(h_ptr, h_ptr, rows, height, width + columns, 0, 2 * width, height, False)
    silu = tl.div_rn(gate, 1.0 + tl.exp(-gate))
    a = silu * up * tl.load(gates_ptr + rows, there, 0.0)[:, None]
    _store_tiles(a, q_ptr, scale_ptr, rows, columns, there, tile, width, height, maximum, floor, pow2)
    _store_tiles(
        gate, kept_ptr, kept_scale_ptr, rows, columns, there, tile, 2 * width, height,
        kept_maximum, kept_floor, kept_pow2,
    )  # fmt: skip
    _store_tiles(
        up, kept_ptr, kept_scale_ptr, rows, width + columns, there, width // 128 + tile, 2 * width, height,
        kept_maximum, kept_floor, kept_pow2,
    )  # fmt: skip


@quick
@triton.jit(do_not_specialize=["height", "scale_rows"])
def _swiglu_backward_kernel(
    h_ptr, in_scale_ptr, gates_ptr, da_ptr, a_ptr, dh_ptr, dgates_ptr, height, width, scale_rows,
    block: constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * block + tl.arange(0, block)
    there = rows < height
    gates = tl.load(gates_ptr + rows, there, 0.0)[:, None]
    total = tl.zeros((block,), tl.float32)
    for start in range(0, width, 128):
        columns = start + tl.arange(0, 128)
        gate = _load(h_ptr, in_scale_ptr, rows, height, columns, start // 128, 2 * width, scale_rows, True)
        of_up = (width + start) // 128
        up = _load(h_ptr, in_scale_ptr, rows, height, width + columns, of_up, 2 * width, scale_rows, True)
        da = _load(da_ptr, h_ptr, rows, height, columns, 0, width, height, False)
        sigmoid = tl.div_rn(tl.full(gate.shape, 1.0, tl.float32), 1.0 + tl.exp(-gate))
        plain = gate * sigmoid * up
        total += tl.sum(plain * da, axis=1)
        da *= gates
        place = rows[:, None].to(tl.int64) * width + columns[None, :]
        tl.store(a_ptr + place, (plain * gates).to(tl.bfloat16), there[:, None])
        place = rows[:, None].to(tl.int64) * (2 * width) + columns[None, :]
        dgate = da * up * (sigmoid + gate * sigmoid * (1.0 - sigmoid))
        tl.store(dh_ptr + place, dgate.to(tl.bfloat16), there[:, None])
        tl.store(dh_ptr + place + width, (da * gate * sigmoid).to(tl.bfloat16), there[:, None])
    tl.store(dgates_ptr + rows, total, there)


@quick
@triton.jit
def _mx_kernel(
    x_ptr, in_scale_ptr, gates_ptr, q_ptr, scale_ptr, ends_ptr, height, width, x_matrix, x_row, x_column,
    maximum: constexpr, floor: constexpr, scaled: constexpr, gated: constexpr, experts: constexpr, slots: constexpr,
):  # fmt: skip
    tile, tiles, local = tl.program_id(1), tl.num_programs(1), tl.arange(0, 128)
    matrix, size = tl.program_id(2).to(tl.int64), tl.num_programs(0) * 128 * tl.cast(tiles * 128, tl.int64)
    rows, columns, last = tl.program_id(0) * 128 + local, tile * 128 + local, width
    block, of_expert = tl.program_id(0) * tiles + tile, tiles
    if experts > 1:  # each expert's scales form a separate matrix
        slot = tl.arange(0, slots)
        _, counts = tiles_of_experts(ends_ptr, experts, slots, 1)
        expert, start, last = rows_of_tile(ends_ptr, tile, width, experts, slots, 1)
        columns, expert = start + local, tl.minimum(expert, experts - 1)  # the last tiles are zeros of the last expert
        before = tl.sum(tl.where(slot < expert, counts, 0))
        of_expert = tl.where(expert < experts - 1, tl.sum(tl.where(slot == expert, counts, 0)), tiles - before)
        block = before * tl.num_programs(0) + tl.program_id(0) * of_expert + tile - before
    there = (rows < height)[:, None] & (columns < last)[None, :]
    place = matrix * x_matrix + rows[:, None].to(tl.int64) * x_row + columns[None, :].to(tl.int64) * x_column
    x = tl.load(x_ptr + place, there, 0.0).to(tl.float32)
    if gated:
        up = tl.load(x_ptr + place + tl.cast(width, tl.int64) * x_column, there, 0.0).to(tl.float32)
        x = tl.div_rn(x, 1.0 + tl.exp(-x)) * up * tl.load(gates_ptr + rows, rows < height, 0.0)[:, None]
    if scaled:  # the scales belong to the transpose of x
        word = (columns // 128 * tl.num_programs(0) + tl.program_id(0)) * 128 + columns % 32 * 4 + columns % 128 // 32
        word = tl.load(in_scale_ptr + word, columns < last, 0)
        factors = (((word[None, :] >> (tl.arange(0, 4) * 8)[:, None]) & 0xFF) << 23).to(tl.float32, bitcast=True)
        x = tl.reshape(tl.reshape(x, (4, 32, 128)) * factors[:, None, :], (128, 128))
    parts = tl.reshape(x, (128, 4, 32))
    scale, inverse = _scales(tl.max(tl.abs(parts), axis=2), maximum, floor, True)
    q = tl.reshape(_cast(parts * inverse[:, :, None], maximum, q_ptr.dtype.element_ty), (128, 128))
    out = rows[:, None].to(tl.int64) * (tiles * 128) + (tile * 128 + local)[None, :]
    tl.store(q_ptr + matrix * size + out, q)
    words = tl.sum((scale.to(tl.int32, bitcast=True) >> 23) << (tl.arange(0, 4) * 8)[None, :], axis=1)
    tl.store(scale_ptr + matrix * (size // 128) + block * 128 + local % 32 * 4 + local // 32, words)


def quantize_tiles(x_RC: Tensor, cast: Cast) -> tuple[Tensor, Tensor]:
    """Returns q (P, C) and scale (P, C / 128), stored column by column."""
    rows, columns = _sizes(x_RC)
    whole = -(-rows // TILE) * TILE
    q, scale = cast.empty_tiles(x_RC, whole, columns)
    _tiles_kernel[(whole // QUANTIZE_ROWS, columns // TILE)](
        x_RC, q, scale, rows, columns, whole, cast.format.max, cast.floor, cast.pow2, QUANTIZE_ROWS,
    )  # fmt: skip
    return q, scale


def quantize_e5m6(x_RC: Tensor, cast: Cast) -> tuple[Tensor, Tensor]:
    """Returns q, uint8 (P, 3 C / 2), packed like `pack_e5m6`, and scale (P, C / 128), stored column by column."""
    rows, columns = _sizes(x_RC)
    whole = -(-rows // TILE) * TILE
    q = x_RC.new_empty(whole, columns // 2 * 3, dtype=torch.uint8)
    scale = empty_scales(x_RC, whole, columns // TILE)
    _e5m6_kernel[(whole // QUANTIZE_ROWS, columns // TILE)](
        x_RC, q.view(torch.int32), scale, rows, columns, whole, cast.format.max, cast.floor, cast.pow2, QUANTIZE_ROWS
    )
    return q, scale


def decode_e5m6(q: Tensor, scale: Tensor, rows: int) -> Tensor:
    """Returns the values of `quantize_e5m6`, bf16 (R, C); exact if scales are powers of two."""
    columns = q.shape[1] // 3 * 2
    out_RC = q.new_empty(rows, columns, dtype=torch.bfloat16)
    _decode_kernel[(-(-rows // QUANTIZE_ROWS), columns // TILE)](
        q.view(torch.int32), scale, out_RC, rows, columns, scale.shape[0], QUANTIZE_ROWS
    )
    return out_RC


def quantize_both(
    x_RC: Tensor, cast: Cast, cast_t: Cast, ends_E: Tensor | None = None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns the results of `quantize_tiles` with the first cast, and of `quantize_columns` with the second. If ends_E
    is given, the first result has no padding rows.
    """
    rows, columns = _sizes(x_RC)
    experts = 1 if ends_E is None else ends_E.shape[0]
    tiles, whole = most_tiles(rows, experts), -(-rows // TILE) * TILE if experts == 1 else rows
    q, scale = cast.empty_tiles(x_RC, whole, columns)
    q_t, scale_t = cast_t.empty_tiles(x_RC, columns, tiles * TILE)
    with_options(_both_kernel[(tiles, columns // TILE)], num_warps=8)(
        x_RC, q, scale, q_t, scale_t, x_RC if ends_E is None else ends_E, rows, columns, whole, tiles * TILE,
        cast.format.max, cast.floor, cast.pow2, cast_t.format.max, cast_t.floor, cast_t.pow2,
        False, experts, power_of_2_from(experts),
    )  # fmt: skip
    return (q, scale), (q_t, scale_t)


def quantize_again(x_RC: Tensor, cast: Cast, cast_t: Cast) -> tuple[Tensor, Tensor]:
    """Quantises x with `cast` (`quantize_tiles`), then quantises the result with `cast_t` (`quantize_columns`). Both casts
    must have the same format.
    """
    rows, columns = _sizes(x_RC)
    tiles = most_tiles(rows, 1)
    q_t, scale_t = cast_t.empty_tiles(x_RC, columns, tiles * TILE)
    with_options(_both_kernel[(tiles, columns // TILE)], num_warps=8)(
        x_RC, q_t, scale_t, q_t, scale_t, x_RC, rows, columns, rows, tiles * TILE,
        cast.format.max, cast.floor, cast.pow2, cast_t.format.max, cast_t.floor, cast_t.pow2, True, 1, 1,
    )  # fmt: skip
    return q_t, scale_t


def quantize_columns(
    x_RC: Tensor,
    cast: Cast,
    in_scale: Tensor | None = None,
    flat: list[int] | None = None,
    ends_E: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns q (C, P) and scale (C, P / 128) of the transpose of x, with tiles along R. The scale is stored column by
    column.

    in_scale: scales of x_RC if x_RC is quantised: FP8, or the packed result of `quantize_e5m6`.
    flat: number of padded rows of each expert. If given, q is flat: one matrix (C, rows) after another.
    ends_E: end of each expert's rows, int32. Each expert has its own tiles; tiles after the last expert are zeros.
    """
    packed = x_RC.dtype == torch.uint8
    if packed:
        x_RC = x_RC.view(torch.int32)
    rows, columns = x_RC.shape[0], x_RC.shape[1] // 3 * 8 if packed else _sizes(x_RC)[1]
    base, stride = (x_RC, x_RC) if flat is None else _tile_places(flat, columns, x_RC.device)
    experts = 1 if ends_E is None else ends_E.shape[0]
    tiles = most_tiles(rows, experts)
    q, scale = cast.empty_tiles(x_RC, columns, tiles * TILE)
    _columns_kernel[(tiles, columns // QUANTIZE_COLUMNS)](
        x_RC, x_RC if in_scale is None else in_scale, q, scale, base, stride, x_RC if ends_E is None else ends_E,
        rows, columns, tiles * TILE, cast.format.max, cast.floor, cast.pow2, in_scale is not None, packed,
        flat is not None, experts, power_of_2_from(experts), QUANTIZE_COLUMNS,
    )  # fmt: skip
    return (q if flat is None else q.flatten()), scale


def quantize_blocks(x_RC: Tensor, cast: Cast, transposed: bool) -> tuple[Tensor, Tensor]:
    """Returns q (..., R, C) and scale (..., R / 128, C / 128), contiguous; both transposed if `transposed`."""
    rows, columns = _sizes(x_RC)
    assert rows % TILE == 0, f"{rows} rows are not whole tiles"
    lead = x_RC.shape[:-2]
    outer, inner = (columns, rows) if transposed else (rows, columns)
    q = x_RC.new_empty(*lead, outer, inner, dtype=cast.format.dtype)
    scale = x_RC.new_empty(*lead, outer // TILE, inner // TILE, dtype=torch.float32)
    strides = (1, inner, 1, inner // TILE) if transposed else (inner, 1, inner // TILE, 1)
    grid = (rows // TILE, columns // TILE, lead.numel())
    with_options(_blocks_kernel[grid], num_warps=8)(
        x_RC, q, scale, rows, columns, *strides, rows * columns, (rows // TILE) * (columns // TILE),
        cast.format.max, cast.floor, cast.pow2, transposed,
    )  # fmt: skip
    return q, scale


def swiglu_tiles(
    h_P2F: Tensor, gates_P: Tensor, cast: Cast, cache: Cast
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns SwiGLU's output (P, F) quantised with `cast`, and h quantised with `cache`.

    Both are results of `quantize_tiles` without padding rows.
    """
    rows, width = _sizes(h_P2F)[0], h_P2F.shape[1] // 2
    made, kept = cast.empty_tiles(h_P2F, rows, width), cache.empty_tiles(h_P2F, rows, 2 * width)
    _swiglu_kernel[(-(-rows // QUANTIZE_ROWS), width // TILE)](
        h_P2F, gates_P, *made, *kept, rows, width, cast.format.max, cast.floor, cast.pow2,
        cache.format.max, cache.floor, cache.pow2, QUANTIZE_ROWS,
    )  # fmt: skip
    return made, kept


def swiglu_backward(h_P2F: Tensor, gates_P: Tensor, da_PF: Tensor, in_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns SwiGLU's output (P, F) and the gradient of h (P, 2F), both in bf16, and the gradient of the gates (P,).

    h_P2F, in_scale: the quantised h and its scale, from `swiglu_tiles`.
    """
    rows, width = _sizes(da_PF)
    a_PF = torch.empty_like(da_PF, dtype=torch.bfloat16)
    dh_P2F = da_PF.new_empty(rows, 2 * width, dtype=torch.bfloat16)
    dgates_P = torch.empty_like(gates_P)
    _swiglu_backward_kernel[(-(-rows // BACKWARD_ROWS),)](
        h_P2F, in_scale, gates_P, da_PF.contiguous(), a_PF, dh_P2F, dgates_P, rows, width, len(h_P2F), BACKWARD_ROWS
    )
    return a_PF, dh_P2F, dgates_P


def quantize_mx(
    x_RC: Tensor,
    cast: Cast,
    in_scale: Tensor | None = None,
    ends_E: Tensor | None = None,
    gates_R: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns q (..., P, Q) and its E8M0 scales: (P, Q / 32), or (..., P x Q / 32) for several matrices.

    x_RC: a tensor with any strides, or the transpose of an earlier call's q.
    in_scale: the scale from this earlier call; None for other tensors.
    ends_E: end of each expert's columns, int32. Each expert has at least one tile, and its scales form a separate
        matrix. Tiles after the last expert's columns are zeros, and belong to the last expert.
    gates_R: if given, x_RC is the input of SwiGLU, whose output is quantised.
    """
    *lead, rows, columns = x_RC.shape
    columns = columns if gates_R is None else columns // 2
    experts = 1 if ends_E is None else len(ends_E)
    tiles = -(-columns // TILE) if ends_E is None else most_tiles(columns + experts, experts)
    whole = -(-rows // TILE) * TILE
    q = x_RC.new_empty(*lead, whole, tiles * TILE, dtype=cast.format.dtype)
    words = q.new_empty(*lead, whole, tiles, dtype=torch.int32)  # one integer for four scales
    with_options(_mx_kernel[(whole // TILE, tiles, lead[0] if lead else 1)], num_warps=16)(
        x_RC, x_RC if in_scale is None else in_scale.view(torch.int32), x_RC if gates_R is None else gates_R, q,
        words, x_RC if ends_E is None else ends_E, rows, columns, x_RC.stride(0) if lead else 0,
        x_RC.stride(-2), x_RC.stride(-1), cast.format.max, cast.floor, in_scale is not None,
        gates_R is not None, experts, power_of_2_from(experts),
    )  # fmt: skip
    scale = words.view(torch.float8_e8m0fnu)
    return q, scale.flatten(-2) if lead else scale


def _sizes(x_RC: Tensor) -> tuple[int, int]:
    """Returns the tensor's last two sizes. Asserts that it is contiguous, with a multiple of 128 columns."""
    rows, columns = x_RC.shape[-2:]
    assert x_RC.is_contiguous(), "kernels read row by row"
    assert columns % TILE == 0, f"{columns} columns are not whole tiles"
    return rows, columns


def _tile_places(lengths: list[int], columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns, for each tile of 128 rows: the offset of its first element in a flat q, and the stride of q's rows."""
    base, stride, before = [], [], 0
    for length in lengths:
        base += range(before * columns, before * columns + length, TILE)
        stride += [length] * (length // TILE)
        before += length
    first, second = on_device([base, stride], device).unbind(0)
    return first, second
