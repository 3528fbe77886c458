"""How rows travel to experts and back, as the paper says it (arXiv 2412.19437, 3.3.2 and 3.3.3), for `mode=prove`.

    out     "we ... quantize the activation before MoE up-projections into FP8 and then apply dispatch"; "a similar strategy is
            applied to the activation gradient before MoE down-projections"; the scales are "integral powers of 2".
    back    "for both the forward and backward combine components, we retain them in BF16".

Everything is fp64, one element as good as the other, and none of it is the product's code: it shows which value a row has on
the other side, and where a sum of rows is rounded.

Shapes: R rows, D channels, S tiles of 128 channels, T tokens, K experts of a token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 128
"""Channels that share a scale: "we group and scale elements on a 1x128 tile basis" (3.3.2)."""
LARGEST = 448.0
"""The largest number of E4M3, the format of "all tensors" (3.3.2)."""
ACTIVATION_FLOOR, GRADIENT_FLOOR = 1e-4, 1e-12
"""Smallest max-abs of a tile that has a scale of its own: as DeepSeek's kernels have it, and for gradients, all of which may lie
below that, only so that no scale is 0."""


def sent_in_fp8(x_RD: Tensor, floor: float) -> Tensor:
    """What arrives of rows: each tile over its power of two, rounded to E4M3, and multiplied with it again."""
    width = x_RD.size(1)
    tiles_RST = F.pad(x_RD.double(), (0, -width % TILE)).unflatten(1, (-1, TILE))
    amax_RS1 = tiles_RST.abs().amax(2, keepdim=True).clamp_min(floor)
    scale_RS1 = power_of_two_above(amax_RS1 / LARGEST)
    return (to_e4m3(tiles_RST / scale_RS1) * scale_RS1).flatten(1)[:, :width]


def power_of_two_above(x: Tensor) -> Tensor:
    """2^ceil(log2 x), exactly."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa 2^exponent, mantissa from 0.5 up to 1
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).int())


def to_e4m3(x: Tensor) -> Tensor:
    """The nearest number with three bits behind the point, of two the even one; below 2^-6 the steps stay those of 2^-6."""
    return _nearest(x, bits=3, least=-6).clamp(-LARGEST, LARGEST)


def to_bf16(x: Tensor) -> Tensor:
    """The nearest number with seven bits behind the point, of two the even one."""
    return _nearest(x, bits=7, least=-126)


def _nearest(x: Tensor, bits: int, least: int) -> Tensor:
    exponent = torch.frexp(x)[1] - 1  # that of the leading bit
    step = torch.ldexp(torch.ones_like(x), exponent.clamp_min(least) - bits)
    return (x / step).round() * step


def summed_rows(
    rows_TKD: Tensor, ids_TK: Tensor, hops: Sequence[int], in_bf16: bool, by_addition: bool = False
) -> tuple[Tensor, Tensor]:
    """The sum of the K rows of every token, and how far from it an honest sum may be, for each element by itself: (T, D) both.

    An honest sum adds in fp32, and is rounded to bf16 (in_bf16; else to fp32) once, at the token. ids_TK: the expert of each row. hops:
    so many experts lie where rows are added first, then so many where those sums are, and so on; each place hands on its own sum,
    rounded. by_addition: the last sum may be rounded after each addition. What is left is the order of additions: it moves
    a result only where the sum lies so near the middle of two numbers of bf16 that it may fall on either side.
    """
    value, off, label = rows_TKD, torch.zeros_like(rows_TKD), ids_TK
    for experts in (*hops, None):
        place = torch.zeros_like(label) if experts is None else label.div(experts, rounding_mode="floor")
        sums, offs, labels = [], [], place.unique()
        for one in labels:
            here = (place == one)[..., None]
            total, size = (value * here).sum(1), (value.abs() * here).sum(1)
            noise = (off * here).sum(1) + value.size(1) * 2.0**-24 * size
            if in_bf16 and experts is None and by_addition:
                noise = noise + (value.size(1) - 1) * 2.0**-8 * size
            sums.append(to_bf16(total) if in_bf16 else total)
            offs.append(to_bf16(total + noise) - to_bf16(total - noise) if in_bf16 else noise)
        value, off = torch.stack(sums, 1), torch.stack(offs, 1)
        label = labels[None] * (experts or 1)
    return value[:, 0], off[:, 0]
