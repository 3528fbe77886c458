"""Products of experts as Triton kernels whose warps have two tasks: some load tiles of operands, the others multiply them.

The arithmetic, and so every bit, is that of train/kernels/fp8/triton_products.py, whose warps wait for what they loaded and for each other. Here a
warp loads through descriptors (TMA) as fast as there is room, and two warpgroups multiply at their own pace (`warp_specialize`). What a model makes of it stands in
train/docs/fp8_kernels.md; no card has run it, so a recipe asks for it: `precision.fp8.backend=specialized`.

Triton lowers this only where no program returns early and an expert's rows are not searched for in the kernel. So another kernel writes them down first, one
entry a tile of rows, or an expert in Wgrad; a tile beyond the last expert's has no rows and no steps.

The module needs triton and is imported only where its kernels run.  Shape suffixes: O, N outer, C contraction, R rows, M tiles of rows,
P columns of whole tiles, E experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.triton_types import constexpr, power_of_2_from, quick, with_options
from train.kernels.fp8.formats import TILE
from train.kernels.fp8.groups import most_tiles
from train.kernels.fp8.triton_products import (
    BAND,
    check_product,
    check_wgrad,
    store_sums,
    tile_of_program,
    tiles_at_once,
)
from train.kernels.fp8.triton_quantize import rows_of_tile, tiles_of_experts

WARPGROUP = 4
"""Warps, which `warp_specialize` makes two of beside the warp that loads."""
STAGES_BY_TILES = {1: 4, 2: 3}
"""By tiles that a program takes at a time: 144 and 209 KiB of shared memory, for descriptors read each operand of a product into a place of its own."""


@quick
@triton.jit
def _places_kernel(ends_ptr, place_ptr, height, experts: constexpr, slots: constexpr):
    """Writes down, of a tile of rows, its expert, the first of its rows, and how many there are."""
    tile = tl.program_id(0)
    expert, first, last = rows_of_tile(ends_ptr, tile, height, experts, slots)
    there = expert < experts
    tl.store(place_ptr + 3 * tile, tl.where(there, expert, 0))
    tl.store(place_ptr + 3 * tile + 1, tl.where(there, first, 0))
    tl.store(place_ptr + 3 * tile + 2, tl.where(there, last - first, 0))


@triton.jit
def _tiles_of(matrix_ptr, rows, columns):
    """The descriptor of a matrix, through which tiles of 128x128 are loaded."""
    # pyrefly: ignore[bad-argument-type]  of numbers Triton makes what its annotations ask for
    return tl.make_tensor_descriptor(matrix_ptr, [rows, columns], [columns, 1], [128, 128])


@quick
@triton.jit
def _grouped_specialized_kernel(
    left_ptr, left_scale_ptr, right_ptr, right_scale_ptr, out_ptr, place_ptr,
    tiles_m, rows, width, steps, experts, width_out, band: constexpr, tiles: constexpr,
):  # fmt: skip
    m, n = tile_of_program(tl.program_id(0), tiles_m, width // (128 * tiles), band)
    expert, first, count = tl.load(place_ptr + 3 * m), tl.load(place_ptr + 3 * m + 1), tl.load(place_ptr + 3 * m + 2)
    contraction = steps * 128
    left, right = _tiles_of(left_ptr, rows, contraction), _tiles_of(right_ptr, experts * width, contraction)
    inside = tl.arange(0, 128)
    acc = tl.zeros((128, 128), tl.float32)
    beside = tl.zeros((128, 128), tl.float32)
    matrix = expert * (width // 128) + n * tiles
    scales = left_scale_ptr + tl.minimum(first + inside, rows - 1)
    for k in tl.range(0, tl.where(count > 0, steps, 0), warp_specialize=True):
        scale = tl.load(scales + k * rows)
        next_scale = scale
        if tiles == 2:
            next_scale *= tl.load(right_scale_ptr + (matrix + 1) * steps + k)
        scale *= tl.load(right_scale_ptr + matrix * steps + k)
        part = left.load([first, k * 128])
        acc += tl.dot(part, right.load([matrix * 128, k * 128]).T) * scale[:, None]
        if tiles == 2:
            # as in _product_kernel: what is multiplied next takes the registers of what was
            acc = tl.inline_asm_elementwise("", "=f,0", [acc], tl.float32, False, 1)
            beside += tl.dot(part, right.load([matrix * 128 + 128, k * 128]).T) * next_scale[:, None]
    column = n * tiles * 128 + inside[None, :]
    out = out_ptr + tl.cast(first, tl.int64) * width_out + (inside[:, None] * width_out + column)
    real = inside[:, None] < count
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=real & (column < width_out))
    if tiles == 2:
        tl.store(out + 128, beside.to(out_ptr.dtype.element_ty), mask=real)


@quick
@triton.jit
def _tiles_of_experts_kernel(ends_ptr, place_ptr, experts: constexpr, slots: constexpr):
    """Writes down, of each expert, the first of its tiles of columns, and how many there are."""
    slot = tl.arange(0, slots)
    _, tiles = tiles_of_experts(ends_ptr, experts, slots)
    tl.store(place_ptr + 2 * slot, tl.cumsum(tiles, axis=0) - tiles, mask=slot < experts)
    tl.store(place_ptr + 2 * slot + 1, tiles, mask=slot < experts)


@quick
@triton.jit
def _grouped_wgrad_specialized_kernel(
    left_ptr, left_scale_ptr, right_ptr, right_scale_ptr, out_ptr, place_ptr,
    height, width, columns, height_out, width_out, added: constexpr, band: constexpr,
):  # fmt: skip
    m, n = tile_of_program(tl.program_id(0), height // 128, width // 128, band)
    expert, inside = tl.program_id(1), tl.arange(0, 128)
    start, count = tl.load(place_ptr + 2 * expert), tl.load(place_ptr + 2 * expert + 1)
    left, right = _tiles_of(left_ptr, height, columns), _tiles_of(right_ptr, width, columns)
    left_scales, right_scales = left_scale_ptr + m * 128 + inside, right_scale_ptr + n * 128 + inside
    acc = tl.zeros((128, 128), tl.float32)
    for k in tl.range(start, start + count, warp_specialize=True):
        scale = tl.load(left_scales + k * height)[:, None] * tl.load(right_scales + k * width)[None, :]
        acc += tl.dot(left.load([m * 128, k * 128]), right.load([n * 128, k * 128]).T) * scale
    store_sums(acc, out_ptr, expert, m, n, height_out, width_out, added)


def product(
    left_RC: Tensor,
    left_scale: Tensor,
    right_ENC: Tensor,
    right_scale: Tensor,
    out_RN: Tensor,
    ends_E: Tensor,
) -> Tensor:
    """out_RN filled with each row times the matrix of its expert, transposed; arguments are those of `product` in triton_products.py."""
    (rows, contraction), (experts, width, _), (height_out, width_out) = left_RC.shape, right_ENC.shape, out_RN.shape
    check_product(left_RC, left_scale, right_ENC, right_scale, out_RN)
    tiles_m = most_tiles(height_out, experts)
    tiles = tiles_at_once(tiles_m, right_ENC, out_RN)
    if out_RN.numel():
        place_M3 = ends_E.new_empty(tiles_m, 3)
        _places_kernel[(tiles_m,)](ends_E, place_M3, height_out, experts, power_of_2_from(experts))
        triton.set_allocator(_scratch)  # of this thread: backward passes have their own
        grid = (tiles_m * (width // (tiles * TILE)),)
        with_options(_grouped_specialized_kernel[grid], num_warps=WARPGROUP, num_stages=STAGES_BY_TILES[tiles])(
            left_RC, left_scale, right_ENC, right_scale, out_RN, place_M3,
            tiles_m, rows, width, contraction // TILE, experts, width_out, BAND, tiles,
        )  # fmt: skip
    return out_RN


def wgrad(
    left_OP: Tensor, left_scale: Tensor, right_NP: Tensor, right_scale: Tensor, out_EON: Tensor, added: bool, ends_E: Tensor
) -> Tensor:  # fmt: skip
    """out_EON filled with left @ right^T over the columns of each expert, or that added to it; arguments are those of `wgrad` in triton_products.py."""
    height, width, columns = check_wgrad(left_OP, left_scale, right_NP, right_scale, out_EON, added)
    experts, height_out, width_out = out_EON.shape
    if out_EON.numel():
        place_E2 = ends_E.new_empty(experts, 2)
        _tiles_of_experts_kernel[(1,)](ends_E, place_E2, experts, power_of_2_from(experts))
        triton.set_allocator(_scratch)
        grid = (height // TILE * (width // TILE), experts)
        with_options(_grouped_wgrad_specialized_kernel[grid], num_warps=WARPGROUP, num_stages=STAGES_BY_TILES[1])(
            left_OP, left_scale, right_NP, right_scale, out_EON, place_E2,
            height, width, columns, height_out, width_out, added, BAND,
        )  # fmt: skip
    return out_EON


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory in which programs write their descriptors; torch aligns it to 512 bytes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
