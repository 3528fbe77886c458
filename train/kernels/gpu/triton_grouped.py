"""Computes the gradient of the experts' weights on a GPU, and sums it in fp32 over the micro-batches.

torch's grouped GEMM only writes bf16. Here each program computes one tile of one expert's gradient in a loop over the
expert's rows, and adds it to the sum. It reads the end of the rows on the device, so the host does not wait. The module
needs triton.

Shape suffixes: R rows sorted by expert, E experts, I inputs and O outputs of the matmul.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.triton_types import constexpr, quick, with_options

TILE_O, TILE_I, STEP_R = 128, 128, 64
"""Height and width of a tile, and number of rows that a program reads at a time."""
NEIGHBOURS = 8
"""Number of adjacent tiles along O that programs compute before the next tile along I, to keep operands cached."""


@quick
@triton.jit
def _gradient_kernel(
    grad_ptr, x_ptr, ends_ptr, out_ptr, outputs, inputs, grad_row, x_row,
    add: constexpr, tile_o: constexpr, tile_i: constexpr, step: constexpr, neighbours: constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    tiles_o, tiles_i = tl.cdiv(outputs, tile_o), tl.cdiv(inputs, tile_i)
    together = neighbours * tiles_i
    first_o = tl.program_id(0) // together * neighbours
    high = min(tiles_o - first_o, neighbours)
    of_o = (first_o + tl.program_id(0) % together % high) * tile_o + tl.arange(0, tile_o)
    of_i = tl.program_id(0) % together // high * tile_i + tl.arange(0, tile_i)
    here_o, here_i = of_o < outputs, of_i < inputs
    end = tl.load(ends_ptr + expert)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    total = tl.zeros((tile_o, tile_i), tl.float32)
    for row in range(start, end, step):
        rows = row + tl.arange(0, step)
        left = tl.load(
            grad_ptr + rows[:, None].to(tl.int64) * grad_row + of_o[None, :],
            (rows < end)[:, None] & here_o[None, :],
            0.0,
        )
        right = tl.load(
            x_ptr + rows[:, None].to(tl.int64) * x_row + of_i[None, :], (rows < end)[:, None] & here_i[None, :], 0.0
        )
        total = tl.dot(tl.trans(left), right, total)
    out_ptr += expert.to(tl.int64) * outputs * inputs
    offsets = of_o[:, None] * inputs + of_i[None, :]
    here = here_o[:, None] & here_i[None, :]
    if add:
        total += tl.load(out_ptr + offsets, here)
    tl.store(out_ptr + offsets, total, here)


def grouped_weight_gradient(grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor, into_EOI: Tensor | None) -> Tensor:
    """Returns grad^T x over the rows of each expert, fp32 (E, O, I), added to into_EOI if given.

    ends_E: end of each expert's rows, int32 (E,). Later rows are ignored.
    """
    grad_RO, x_RI = grad_RO.contiguous(), x_RI.contiguous()
    experts, outputs, inputs = len(ends_E), grad_RO.shape[1], x_RI.shape[1]
    out_EOI = grad_RO.new_empty(experts, outputs, inputs, dtype=torch.float32) if into_EOI is None else into_EOI
    assert out_EOI.is_contiguous() and out_EOI.dtype == torch.float32 and out_EOI.shape == (experts, outputs, inputs)
    tiles = -(-outputs // TILE_O) * -(-inputs // TILE_I)
    with_options(_gradient_kernel[(tiles, experts)], num_warps=8, num_stages=3)(
        grad_RO, x_RI, ends_E, out_EOI, outputs, inputs, outputs, inputs, into_EOI is not None,
        TILE_O, TILE_I, STEP_R, NEIGHBOURS,
    )  # fmt: skip
    return out_EOI
