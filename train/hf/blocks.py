"""FP8 weights in blocks of 128x128 with one fp32 scale each (paper 3.3.2): lossless conversion to fp32 and back.

A block holds fp32(q * s), where q is an E4M3 value and s is the scale. `requantize` uses the first of these scales that
reproduces every value of the block:

    1. amax / 448, with the floor of 1e-4 on amax: the scale for a block of new values
    2. amax / m for m = 448, 416, ..., 240 (the E4M3 values of one binade), and the two neighbouring fp32 values of each

If none does, training has changed the block, and `requantize` rounds it with candidate 1. So unchanged FP8 weights keep
their values. They also keep q and s bit for bit in these cases:
- s was computed as amax / 448, as in DeepSeek's weights. The roundings of 448 s and of the division are together
  smaller than one unit in the last place of s.
- The largest |q| of the block exceeds 224, and some |q| is a power of two.

If the largest |q| is 224, `requantize` may return 2 q and s / 2, which represent the same values.

Shapes: M rows, K columns, m and k blocks of rows and columns, N blocks, X values of a block.
"""

import torch
from torch import Tensor

from train.hf.config import SCALE_BLOCK, scale_shape
from train.kernels.fp8.formats import E4M3, Cast
from train.kernels.fp8.quantize import blocked, quantize, unblocked

CAST = Cast(E4M3, (SCALE_BLOCK, SCALE_BLOCK), pow2=False)
TOP_BINADE = (448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0, 240.0)
"""Candidates for a block's maximum |q|: the E4M3 values of the highest binade.

They suffice for a smaller maximum, because 2 q and s / 2 represent the same values.
"""


def dequantize(q_MK: Tensor, scale_mk: Tensor) -> Tensor:
    """Return the values in fp32 (M, K). Blocks at edges may be smaller."""
    blocks = blocked(q_MK.float(), (SCALE_BLOCK, SCALE_BLOCK))
    return unblocked(blocks.mul_(scale_mk.float()[:, None, :, None]), q_MK.shape)


def requantize(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and scale for fp32 values (M, K). Values from FP8 blocks are exact; others are rounded as in
    `quantize`."""
    default = quantize(x_MK, CAST)
    blocks_NX, q_NX, scale_N = _per_block(x_MK), _per_block(default.q), default.scale.flatten()
    wrong = (~_equal(q_NX, scale_N, blocks_NX)).nonzero().squeeze(1)
    if wrong.numel():
        found, found_scale = _search(blocks_NX[wrong])
        wrong = wrong[found]
        scale_N[wrong] = found_scale
        q_NX[wrong] = _cast(blocks_NX[wrong], found_scale)
    rows, columns = scale_shape(x_MK.shape)
    q = q_NX.view(rows, columns, SCALE_BLOCK, SCALE_BLOCK).transpose(1, 2)
    return unblocked(q, x_MK.shape), scale_N.view(rows, columns)


def _per_block(x_MK: Tensor) -> Tensor:
    """Return one row per block, padded with zeros at the edges."""
    size = x_MK.element_size()
    bits = x_MK.view(torch.uint8) if size == 1 else x_MK  # torch cannot pad and copy E4M3
    blocks = blocked(bits, (SCALE_BLOCK, SCALE_BLOCK)).transpose(1, 2).reshape(-1, SCALE_BLOCK * SCALE_BLOCK)
    return blocks.view(x_MK.dtype)


def _cast(blocks_NX: Tensor, scale_N: Tensor) -> Tensor:
    """Return x / s in E4M3. Values slightly above 448 become 448."""
    return (blocks_NX / scale_N[:, None]).to(E4M3.dtype)


def _equal(q_NX: Tensor, scale_N: Tensor, blocks_NX: Tensor) -> Tensor:
    """Return for every block whether q * s equals the block."""
    return (q_NX.float().mul_(scale_N[:, None]) == blocks_NX).all(1)


def _search(blocks_NX: Tensor) -> tuple[Tensor, Tensor]:
    """Return the blocks that a candidate scale reproduces, and their scales."""
    amax_N = blocks_NX.abs().amax(1)
    scale_N, open_N = torch.zeros_like(amax_N), torch.arange(len(blocks_NX))
    for top in TOP_BINADE:
        middle_N = amax_N / top
        for candidate_N in (middle_N, _beside(middle_N, 1), _beside(middle_N, -1)):
            trial_N = candidate_N[open_N]
            # one row excludes most wrong candidates at a hundredth of the cost
            hopeful = _reproduces(blocks_NX[open_N, :SCALE_BLOCK], trial_N).nonzero().squeeze(1)
            hopeful = hopeful[_reproduces(blocks_NX[open_N[hopeful]], trial_N[hopeful])]
            scale_N[open_N[hopeful]] = trial_N[hopeful]
            open_N = open_N[scale_N[open_N] == 0]
    found = scale_N.nonzero().squeeze(1)
    return found, scale_N[found]


def _reproduces(blocks_NX: Tensor, scale_N: Tensor) -> Tensor:
    return _equal(_cast(blocks_NX, scale_N), scale_N, blocks_NX)


def _beside(scale_N: Tensor, places: int) -> Tensor:
    """Return, for each scale, the fp32 number that is `places` steps between adjacent fp32 numbers above the scale.

    If `places` is negative, the value is below the scale. Scales must be positive.
    """
    return (scale_N.view(torch.int32) + places).view(torch.float32)
