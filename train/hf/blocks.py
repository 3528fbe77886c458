"""FP8 weights in blocks of 128x128 with one fp32 scale each (paper 3.3.2): to fp32 and back, with nothing lost.

A block holds fp32(q * s). Taking the scale again from the block's max-abs, s = amax / 448, gives q and s back bit for bit
where s was made that way, as DeepSeek made its weights: then the largest |q| is 448, and the two roundings, of 448 s and
of the division, cannot add up to a place of s. Blocks that were scaled by another rule would get another s and with it
other values. So `requantize` tries candidates and keeps the first that reproduces every value of the block:

    1. amax / 448, with the floor of 1e-4 on amax: what a block of new values gets
    2. amax / m for m = 448, 416, ..., 240 (the E4M3 values of one binade), and one fp32 to either side

What none reproduces was trained since, and is rounded with 1. Hence the rule: unchanged FP8 weights keep their values
whatever their scales, and q and s bit for bit where the largest |q| of a block exceeds 224 and its values determine s.
They do unless all are zero, or no |q| is a power of two, when two neighbours of s can give the same values: blocks of
weights always have one. Power-of-two scales (UE8M0) put the largest weight into (224 s, 448 s], so their largest |q| exceeds
224 too, unless that weight was below 232 s and was rounded to 224 s. Such a block is also 2 q and s / 2, which is how a block
whose largest weight was 224 s is held; values cannot tell the two apart, and both get the latter.

Shapes: M rows, K columns, m and k blocks of rows and columns, N blocks, X values of a block.
"""

import torch
from torch import Tensor

from train.hf.config import SCALE_BLOCK, scale_shape
from train.kernels.fp8.formats import E4M3, Cast
from train.kernels.fp8.quantize import blocked, quantize, unblocked

CAST = Cast(E4M3, (SCALE_BLOCK, SCALE_BLOCK), pow2=False)
TOP_BINADE = (448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0, 240.0)
"""Largest |q| of a block after its q were doubled as often as E4M3 has room for."""


def dequantize(q_MK: Tensor, scale_mk: Tensor) -> Tensor:
    """fp32 (M, K). A block is cut short at the lower and right edges."""
    blocks = blocked(q_MK.float(), (SCALE_BLOCK, SCALE_BLOCK))
    return unblocked(blocks.mul_(scale_mk.float()[:, None, :, None]), q_MK.shape)


def requantize(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale) of fp32 (M, K); exact where the values are those of FP8 blocks, else as `quantize` rounds them."""
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
    """One row per block, zero-padded at the edges."""
    size = x_MK.element_size()
    bits = x_MK.view(torch.uint8) if size == 1 else x_MK  # padding and copying know no E4M3
    blocks = blocked(bits, (SCALE_BLOCK, SCALE_BLOCK)).transpose(1, 2).reshape(-1, SCALE_BLOCK * SCALE_BLOCK)
    return blocks.view(x_MK.dtype)


def _cast(blocks_NX: Tensor, scale_N: Tensor) -> Tensor:
    """x / s in E4M3, which rounds what a scale one place below amax / 448 makes a little more than 448 to it."""
    return (blocks_NX / scale_N[:, None]).to(E4M3.dtype)


def _equal(q_NX: Tensor, scale_N: Tensor, blocks_NX: Tensor) -> Tensor:
    """Whether q * s is the block again, for every block."""
    return (q_NX.float().mul_(scale_N[:, None]) == blocks_NX).all(1)


def _search(blocks_NX: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the blocks that some candidate reproduces, and the first such scale of each."""
    amax_N = blocks_NX.abs().amax(1)
    scale_N, open_N = torch.zeros_like(amax_N), torch.arange(len(blocks_NX))
    for top in TOP_BINADE:
        middle_N = amax_N / top
        for candidate_N in (middle_N, _beside(middle_N, 1), _beside(middle_N, -1)):
            trial_N = candidate_N[open_N]
            # a row of the block tells most of the wrong ones at a hundredth of the cost
            hopeful = _reproduces(blocks_NX[open_N, :SCALE_BLOCK], trial_N).nonzero().squeeze(1)
            hopeful = hopeful[_reproduces(blocks_NX[open_N[hopeful]], trial_N[hopeful])]
            scale_N[open_N[hopeful]] = trial_N[hopeful]
            open_N = open_N[scale_N[open_N] == 0]
    found = scale_N.nonzero().squeeze(1)
    return found, scale_N[found]


def _reproduces(blocks_NX: Tensor, scale_N: Tensor) -> Tensor:
    return _equal(_cast(blocks_NX, scale_N), scale_N, blocks_NX)


def _beside(scale_N: Tensor, places: int) -> Tensor:
    """The fp32 that many places away; scales are positive."""
    return (scale_N.view(torch.int32) + places).view(torch.float32)
