"""The AdamW of train/optim/adamw.py on a GPU, and sums of squares for norms, each in one pass over memory.

One launch processes many tensors, whose addresses are in a table on the device. A program processes a chunk:
PROGRAM_ELEMENTS elements of one tensor.

Every element gets the same fp32 arithmetic, so shard boundaries do not change the result. The module needs triton.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.triton_types import constexpr, with_options

PROGRAM_ELEMENTS, ELEMENTS_AT_ONCE = 1 << 14, 1 << 11
"""Number of elements that a program processes in total, and at a time."""
ALIGNED = 16
"""If all tensors' addresses (in bytes) and sizes (in elements) are multiples of this number, threads read 128 bits at a
time.
"""


class _Layout(NamedTuple):
    """Describes how tensors are cut into chunks, one chunk per program. The fields are int64, on the device."""

    starts: Tensor
    """Index of every tensor's first element among all elements. The last entry is the total number of elements."""
    first_chunks: Tensor
    """Index of every tensor's first chunk. The last entry is the total number of chunks."""
    piece_of_chunk: Tensor


@triton.jit
def _chunk(pointers_ptr, starts_ptr, firsts_ptr, pieces_ptr, chunk: constexpr, aligned: constexpr):
    """Returns the address of this program's tensor, the start of the chunk in the tensor, the start of the tensor
    among all tensors, and the size of the tensor.
    """
    piece = tl.load(pieces_ptr + tl.program_id(0))
    start = tl.load(starts_ptr + piece)
    size = tl.load(starts_ptr + piece + 1) - start
    address = tl.load(pointers_ptr + piece)
    if aligned:
        address, start, size = tl.multiple_of(address, 16), tl.multiple_of(start, 16), tl.multiple_of(size, 16)
    first = (tl.program_id(0) - tl.load(firsts_ptr + piece)) * chunk
    return address.to(tl.pointer_type(tl.float32)), first, start, size


@triton.jit
def _update_kernel(
    weight_ptr, mean_ptr, square_ptr, pointers_ptr, starts_ptr, firsts_ptr, pieces_ptr,
    factor, lerp, keep_square, add_square, decay, step, root, eps,
    aligned: constexpr, chunk: constexpr, block: constexpr,
):  # fmt: skip
    gradient_ptr, first, start, size = _chunk(pointers_ptr, starts_ptr, firsts_ptr, pieces_ptr, chunk, aligned)
    for begin in range(0, chunk, block):
        at = first + begin + tl.arange(0, block)
        here, place = at < size, start + at
        g = tl.load(gradient_ptr + at, here, 0.0) * factor
        m = tl.load(mean_ptr + place, here, 0.0).to(tl.float32)
        v = tl.load(square_ptr + place, here, 0.0).to(tl.float32)
        w = tl.load(weight_ptr + place, here, 0.0) * decay
        m = tl.fma(g - m, lerp, m)
        v = tl.fma(g * add_square, g, v * keep_square)
        w -= tl.div_rn(m * step, tl.div_rn(tl.sqrt_rn(v), root) + eps)
        tl.store(weight_ptr + place, w, here)
        tl.store(mean_ptr + place, m.to(mean_ptr.dtype.element_ty), here)
        tl.store(square_ptr + place, v.to(square_ptr.dtype.element_ty), here)


@triton.jit
def _squares_kernel(
    sums_ptr, pointers_ptr, starts_ptr, firsts_ptr, pieces_ptr,
    aligned: constexpr, chunk: constexpr, block: constexpr,
):  # fmt: skip
    x_ptr, first, _, size = _chunk(pointers_ptr, starts_ptr, firsts_ptr, pieces_ptr, chunk, aligned)
    total = tl.zeros((block,), tl.float32)
    for begin in range(0, chunk, block):
        at = first + begin + tl.arange(0, block)
        x = tl.load(x_ptr + at, at < size, 0.0)
        total += x * x
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total.to(tl.float64)))


@triton.jit
def _sums_kernel(chunks_ptr, out_ptr, firsts_ptr, block: constexpr):
    """Adds the sums of every tensor's chunks, in order."""
    first, end = tl.load(firsts_ptr + tl.program_id(0)), tl.load(firsts_ptr + tl.program_id(0) + 1)
    total = tl.zeros((block,), tl.float64)
    for begin in range(first, end, block):
        at = begin + tl.arange(0, block)
        total += tl.load(chunks_ptr + at, at < end, 0.0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


def update(
    weight: Tensor, mean: Tensor, square: Tensor, gradients: Sequence[Tensor],
    *, factor: float, lerp: float, keep_square: float, add_square: float, decay: float, step: float, root: float, eps: float,
) -> None:  # fmt: skip
    """Update a flat shard. Each gradient g is first multiplied by factor. Then mean += lerp * (g - mean); square =
    keep_square * square + add_square * g^2; weight = decay * weight - step * mean / (sqrt(square) / root + eps).

    gradients: 1-D fp32 tensors that cover the shard one after another.
    """
    gradients = [one for one in gradients if one.numel()]
    if not gradients:
        return
    layout, pointers, aligned = _table(gradients)
    with_options(_update_kernel[(len(layout.piece_of_chunk),)], num_warps=8)(
        weight, mean, square, pointers, layout.starts, layout.first_chunks, layout.piece_of_chunk,
        factor, lerp, keep_square, add_square, decay, step, root, eps, aligned, PROGRAM_ELEMENTS, ELEMENTS_AT_ONCE,
    )  # fmt: skip


def sums_of_squares(pieces: Sequence[Tensor]) -> Tensor:
    """Returns the sum of squares of every 1-D fp32 tensor: fp64 (len(pieces),)."""
    chunks, first_chunks = squares_of_chunks(pieces)
    out = chunks.new_empty(len(pieces))
    _sums_kernel[(len(pieces),)](chunks, out, first_chunks, ELEMENTS_AT_ONCE)
    return out


def squares_of_chunks(pieces: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the sum of squares of every chunk, and the index of every tensor's first chunk.

    A program computes ELEMENTS_AT_ONCE sums in fp32, and adds them in fp64.
    """
    layout, pointers, aligned = _table(pieces)
    chunks = pointers.new_empty(len(layout.piece_of_chunk), dtype=torch.float64)
    if len(chunks):
        with_options(_squares_kernel[(len(chunks),)], num_warps=8)(
            chunks,
            pointers,
            layout.starts,
            layout.first_chunks,
            layout.piece_of_chunk,
            aligned,
            PROGRAM_ELEMENTS,
            ELEMENTS_AT_ONCE,
        )
    return chunks, layout.first_chunks


def _table(pieces: Sequence[Tensor]) -> tuple[_Layout, Tensor, bool]:
    """Returns the tensors' layout, their addresses, and whether all addresses and sizes are multiples of ALIGNED."""
    device = pieces[0].device
    assert all(one.dtype == torch.float32 and one.is_contiguous() and one.device == device for one in pieces)
    sizes, addresses = tuple(one.numel() for one in pieces), [one.data_ptr() for one in pieces]
    aligned = not any(size % ALIGNED for size in sizes) and not any(address % ALIGNED for address in addresses)
    return _layout(sizes, device), _there(addresses, device), aligned


@lru_cache(maxsize=64)
def _layout(sizes: tuple[int, ...], device: torch.device) -> _Layout:
    """Returns the layout of tensors with these sizes, cached."""
    starts, firsts = [0], [0]
    for size in sizes:
        starts.append(starts[-1] + size)
        firsts.append(firsts[-1] - -size // PROGRAM_ELEMENTS)
    chunks = torch.repeat_interleave(torch.tensor(firsts).diff())
    return _Layout(_there(starts, device), _there(firsts, device), _there(chunks, device))


def _there(numbers: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Returns the numbers as int64 on the device, copied from page-locked memory without waiting."""
    numbers = torch.as_tensor(numbers)
    return (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)
