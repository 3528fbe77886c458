"""How rows travel to experts and back, as the paper says it (arXiv 2412.19437, 3.3.2 and 3.3.3), for `mode=prove`.

    out     "we ... quantize the activation before MoE up-projections into FP8 and then apply dispatch"; "a similar strategy is
            applied to the activation gradient before MoE down-projections"; the scales are "integral powers of 2".
    back    "for both the forward and backward combine components, we retain them in BF16".

Everything is fp64, one element as good as the other, and none of it is the product's code: it shows which value a row has on
the other side, and where a sum of rows is rounded.

Shapes: R rows, D channels, T tokens, K experts of a token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from train.prove.low_precision import FORMATS, NearNumbers, Rule, cast, nearest

BF16 = FORMATS["bf16"]
ACTIVATION_FLOOR, GRADIENT_FLOOR = 1e-4, 1e-12
"""Smallest max-abs of a tile that has a scale of its own: as DeepSeek's kernels have it, and for gradients, all of which may lie
below that, only so that no scale is 0."""


def sent_in_fp8(x_RD: Tensor, floor: float) -> Tensor:
    """What arrives of rows, each tile over its power of two, rounded to E4M3, and multiplied with it again: "we group and scale
    elements on a 1x128 tile basis", in the format of "all tensors" (3.3.2).
    """
    return cast(NearNumbers(x_RD.double()), Rule(FORMATS["e4m3"], "1x128", True, floor), -1).x


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
            sums.append(nearest(total, BF16) if in_bf16 else total)
            offs.append(nearest(total + noise, BF16) - nearest(total - noise, BF16) if in_bf16 else noise)
        value, off = torch.stack(sums, 1), torch.stack(offs, 1)
        label = labels[None] * (experts or 1)
    return value[:, 0], off[:, 0]
