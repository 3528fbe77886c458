"""Triton kernels for FP8 GEMMs that are grouped by expert.

    matmul      left (R, C), right (E, N, C) -> (R, N)     Fprop and Dgrad: each row times its expert's matrix
    wgrad       left (O, P), right (N, P) -> (E, O, N)     Wgrad: a separate sum over the columns of each expert

A scale applies to 1x128 values; in the right operand of `matmul`, to 128x128. Tensor cores accumulate with low
precision. So they sum only 128 elements of the contraction, and the kernel adds this scaled sum in fp32 (paper 3.3.2).
`wgrad` can add to an existing result in fp32.

The kernels read the end of each expert's rows on the device, so the host never waits. In Fprop and Dgrad, rows have no
padding. In Wgrad, zeros fill each expert's last tile of columns. All other sizes are multiples of 128. A dense GEMM has
a single expert.

The position of a tile has 64 bits, and the offsets of its elements have 32 bits. In a large GEMM, a program computes
two adjacent tiles.

The module needs triton. Shape suffixes: O, N outer, C contraction, R rows, P columns of whole tiles, E experts.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from conf.thresholds import THRESHOLDS
from parallel.triton_types import constexpr, power_of_2_from, quick, with_options
from train.kernels.fp8.formats import TILE
from train.kernels.fp8.groups import most_tiles
from train.kernels.fp8.triton_quantize import rows_of_tile, tiles_of_experts

BAND = 8
"""Number of adjacent row tiles that consecutive programs compute for one column tile. These programs share the tile of
the right operand.
"""
WARPS, STAGES = 8, 4
"""Number of warps and of pipeline stages of a program. Eight warps are two warpgroups of 64 rows each. A stage has 32
KiB of shared memory, or 48 KiB for two tiles.
"""
LANES = 32
"""Threads of a warp. The vectors from which a kernel computes its number of loop steps have at least this length. Then
the compiler knows that all threads run the same number of steps (Triton 3.7.1).
"""


def _named(kernel: str, specialization) -> str:
    """Returns a kernel's name in profilers: grouped or dense."""
    return f"_grouped_{kernel}_kernel" if specialization.constants["experts"] > 1 else f"_{kernel}_kernel"


@triton.jit
def tile_of_program(program, tiles_m, tiles_n, band: constexpr):
    """Returns a program's tile (m, n). Programs compute `band` adjacent m for one n, then the same m for the next n."""
    first = program // (band * tiles_n) * band
    height = tl.minimum(tiles_m - first, band)
    inside = program % (band * tiles_n)
    return first + inside % height, inside // height


@quick
@triton.jit(repr=partial(_named, "matmul"), do_not_specialize=["tiles_m", "scale_rows", "height_out"])
def _matmul_kernel(
    left_ptr, left_scale_ptr, right_ptr, right_scale_ptr, out_ptr, ends_ptr,
    tiles_m, width, steps, scale_rows, height_out, width_out,
    experts: constexpr, slots: constexpr, band: constexpr, tiles: constexpr,
):  # fmt: skip
    m, n = tile_of_program(tl.program_id(0), tiles_m, width // (128 * tiles), band)
    expert, first, last = rows_of_tile(ends_ptr, m, height_out, experts, slots)
    if expert >= experts:
        return
    inside, contraction = tl.arange(0, 128), steps * 128
    read = tl.minimum(inside, last - first - 1)  # rows of other experts are neither read nor stored
    acc = tl.zeros((128, 128), tl.float32)
    beside = tl.zeros((128, 128), tl.float32)
    matrix = tl.cast(expert, tl.int64) * (width // 128) + n * tiles
    left, right = left_ptr + tl.cast(first, tl.int64) * contraction, right_ptr + matrix * 128 * contraction
    next_right = right + 128 * contraction
    place = inside[:, None] * contraction + inside[None, :]
    left_place = read[:, None] * contraction + inside[None, :]
    left_scale, right_scale = first + read, matrix * steps
    for _ in range(steps):
        scale = tl.load(left_scale_ptr + left_scale)
        next_scale = scale
        if tiles == 2:
            next_scale *= tl.load(right_scale_ptr + right_scale + steps)
        scale *= tl.load(right_scale_ptr + right_scale)
        rows = tl.load(left + left_place)
        acc += tl.dot(rows, tl.load(right + place).T) * scale[:, None]
        if tiles == 2:
            # This empty instruction makes the compiler finish the first GEMM before the second, in the same registers.
            acc = tl.inline_asm_elementwise("", "=f,0", [acc], tl.float32, True, 1)
            beside += tl.dot(rows, tl.load(next_right + place).T) * next_scale[:, None]
            next_right += 128
        left, right = left + 128, right + 128
        left_scale_ptr, right_scale_ptr = left_scale_ptr + scale_rows, right_scale_ptr + 1
    # Add a zero that the compiler cannot recognise as zero. So it computes the offsets of the results only here, and
    # the loop has more registers.
    inside += scale_rows >> 31
    row = width if tiles == 2 else width_out
    out = out_ptr + tl.cast(first, tl.int64) * row + n * tiles * 128 + (inside[:, None] * row + inside[None, :])
    real = inside[:, None] < last - first
    if tiles == 1:
        real &= n * 128 + inside[None, :] < width_out
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=real)
    if tiles == 2:
        tl.store(out + 128, beside.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def store_sums(acc, out_ptr, expert, m, n, height_out, width_out, added: constexpr):
    """Store tile (m, n) of an expert's matrix. added: whether to add to existing values."""
    row, column = m * 128 + tl.arange(0, 128), n * 128 + tl.arange(0, 128)
    matrix = out_ptr + expert.to(tl.int64) * height_out * width_out
    out = matrix + row[:, None].to(tl.int64) * width_out + column[None, :]
    real = (row[:, None] < height_out) & (column[None, :] < width_out)
    if added:
        acc += tl.load(out, mask=real)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=real)


@quick
@triton.jit(repr=partial(_named, "wgrad"))
def _wgrad_kernel(
    left_ptr, left_scale_ptr, right_ptr, right_scale_ptr, out_ptr, ends_ptr, height, width, columns, height_out, width_out,
    added: constexpr, experts: constexpr, slots: constexpr, band: constexpr,
):  # fmt: skip
    m, n = tile_of_program(tl.program_id(0), height // 128, width // 128, band)
    expert, inside = tl.program_id(1), tl.arange(0, 128)
    start, count = 0, columns // 128
    if experts > 1:
        _, tiles = tiles_of_experts(ends_ptr, experts, slots)
        slot = tl.arange(0, slots)
        start = tl.sum(tl.where(slot < expert, tiles, 0))
        count = tl.sum(tl.where(slot == expert, tiles, 0))
    if added:  # noqa: SIM102 (the first condition is known when the kernel is compiled)
        if count == 0:
            return
    first = tl.cast(start, tl.int64) * 128
    place = inside[:, None] * columns + inside[None, :]
    left = left_ptr + m.to(tl.int64) * 128 * columns + first
    right = right_ptr + n.to(tl.int64) * 128 * columns + first
    left_scale = left_scale_ptr + tl.cast(start, tl.int64) * height + m * 128
    right_scale = right_scale_ptr + tl.cast(start, tl.int64) * width + n * 128
    acc = tl.zeros((128, 128), tl.float32)
    for _ in range(count):
        scale = tl.load(left_scale + inside)[:, None] * tl.load(right_scale + inside)[None, :]
        acc += tl.dot(tl.load(left + place), tl.load(right + place).T) * scale
        left, right = left + 128, right + 128
        left_scale, right_scale = left_scale + height, right_scale + width
    store_sums(acc, out_ptr, expert, m, n, height_out, width_out, added)


def matmul(
    left_RC: Tensor,
    left_scale: Tensor,
    right_ENC: Tensor,
    right_scale: Tensor,
    out_RN: Tensor,
    ends_E: Tensor | None = None,
) -> Tensor:
    """Fill out_RN, bf16 or fp32, with the product of each row and the transposed matrix of the row's expert.

    left_scale: (R, C / 128), stored column by column.
    right_scale: (E, N / 128, C / 128), contiguous.
    out_RN: may have fewer rows and columns than the operands.
    ends_E: end of each expert's rows, int32; the last is the number of rows of out_RN. None for a single matrix.
    """
    (rows, contraction), (experts, width, _), (height_out, width_out) = left_RC.shape, right_ENC.shape, out_RN.shape
    check_matmul(left_RC, left_scale, right_ENC, right_scale, out_RN)
    assert experts == 1 or ends_E is not None, "several experts have ends"
    tiles_m = most_tiles(height_out, experts)
    tiles = tiles_at_once(tiles_m, right_ENC, out_RN)
    if out_RN.numel():
        with_options(_matmul_kernel[(tiles_m * (width // (tiles * TILE)),)], num_warps=WARPS, num_stages=STAGES)(
            left_RC, left_scale, right_ENC, right_scale, out_RN, left_RC if ends_E is None else ends_E,
            tiles_m, width, contraction // TILE, rows, height_out, width_out,
            experts, power_of_2_from(experts), BAND, tiles,
        )  # fmt: skip
    return out_RN


def check_matmul(left_RC: Tensor, left_scale: Tensor, right_ENC: Tensor, right_scale: Tensor, out_RN: Tensor) -> None:
    """Asserts the layout of the operands of `matmul`."""
    rows, contraction = left_RC.shape
    _whole(right_ENC)
    assert left_RC.is_contiguous() and _by_column(left_scale) and left_scale.shape == (rows, contraction // TILE)
    assert right_scale.is_contiguous() and out_RN.is_contiguous() and out_RN.shape[0] <= rows


def check_wgrad(
    left_OP: Tensor, left_scale: Tensor, right_NP: Tensor, right_scale: Tensor, out_EON: Tensor, added: bool
) -> tuple[int, int, int]:
    """Asserts the layout of the operands of `wgrad`. Returns the padded height and width, and the number of columns."""
    (height, columns), (width, others) = _whole(left_OP), _whole(right_NP)
    assert others == columns and out_EON.is_contiguous()
    assert _by_column(left_scale) and _by_column(right_scale)
    assert out_EON.dtype == torch.float32 or not added, "sums are fp32"
    return height, width, columns


def tiles_at_once(tiles_m: int, right_ENC: Tensor, out_RN: Tensor) -> int:
    """Returns how many adjacent tiles a program computes, 1 or 2. tiles_m: number of row tiles."""
    experts, width, contraction = right_ENC.shape
    in_pairs = width == out_RN.shape[1] and width % (2 * TILE) == 0
    in_pairs &= experts > 1 and contraction > TILE  # in other cases the compiler unrolls the loop
    return 2 if in_pairs and tiles_m * (width // TILE) >= THRESHOLDS.matmul_tiles else 1


def wgrad(
    left_OP: Tensor, left_scale: Tensor, right_NP: Tensor, right_scale: Tensor, out_EON: Tensor, added: bool,
    ends_E: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Fill out_EON, bf16 or fp32, with left @ right^T, summed separately over the columns of each expert.

    An expert without columns gets zeros. Each expert has complete tiles of columns.

    left_scale, right_scale: (O or N, P / 128), stored column by column.
    out_EON: may have fewer rows and columns than the operands.
    added: whether to add to the existing values of out_EON, in fp32.
    ends_E: end of each expert's columns, int32; None for one expert.
    """
    height, width, columns = check_wgrad(left_OP, left_scale, right_NP, right_scale, out_EON, added)
    experts, height_out, width_out = out_EON.shape
    assert experts == 1 or ends_E is not None, "several experts have ends"
    if out_EON.numel():
        slots = max(LANES, power_of_2_from(experts))
        with_options(_wgrad_kernel[(height // TILE * (width // TILE), experts)], num_warps=WARPS, num_stages=STAGES)(
            left_OP, left_scale, right_NP, right_scale, out_EON, left_OP if ends_E is None else ends_E,
            height, width, columns, height_out, width_out, added, experts, slots, BAND,
        )  # fmt: skip
    return out_EON


def _by_column(scale: Tensor) -> bool:
    return scale.stride() == (1, scale.shape[0])


def _whole(x: Tensor) -> tuple[int, int]:
    """Returns the tensor's last two sizes. Asserts that it is contiguous, and both sizes are multiples of 128."""
    rows, columns = x.shape[-2:]
    assert x.is_contiguous() and rows % TILE == 0 and columns % TILE == 0, f"{rows} x {columns} is not whole tiles"
    return rows, columns
