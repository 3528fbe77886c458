"""Dispatch and combine of rows by the paper (arXiv 2412.19437, 3.3.2 and 3.3.3), for `mode=prove`.

    dispatch   "we ... quantize the activation before MoE up-projections into FP8 and then apply dispatch"; "a similar strategy is
               applied to the activation gradient before MoE down-projections"; the scales are "integral powers of 2".
    combine    "for both the forward and backward combine components, we retain them in BF16".

All arithmetic is fp64, without Sluice's code. It gives the values of received rows, and the places where a sum of
rows is rounded.

Shapes: R rows, D channels, T tokens, K experts of a token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from train.prove.low_precision import FORMATS, NearNumbers, Rule, cast, nearest

BF16 = FORMATS["bf16"]
ACTIVATION_FLOOR, GRADIENT_FLOOR = 1e-4, 1e-12
"""Lower bound of a tile's max-abs in its scale: as in DeepSeek's kernels; for gradients, which may all be smaller, only
to avoid a scale of 0."""


def sent_in_fp8(x_RD: Tensor, floor: float) -> Tensor:
    """The received rows: each tile divided by its power of two, rounded to E4M3, and multiplied by it again.

    "We group and scale elements on a 1x128 tile basis", in the format of "all tensors" (3.3.2).
    """
    return cast(NearNumbers(x_RD.double()), Rule(FORMATS["e4m3"], "1x128", True, floor), -1).x


def summed_rows(
    rows_TKD: Tensor, ids_TK: Tensor, hops: Sequence[int], in_bf16: bool, by_addition: bool = False
) -> tuple[Tensor, Tensor]:
    """The sum of the K rows of every token, and the possible error of a correct sum per element: (T, D) both.

    A correct sum adds in fp32 and is rounded once, at the token, to bf16 (in_bf16) or fp32. ids_TK: the expert of each
    row. hops: numbers of experts per place, from the first place where rows are added to later places; each place
    rounds and sends its sum. by_addition: the last sum may be rounded after each addition. The order of additions may
    also change a result, but only if the sum is so close to the middle of two bf16 numbers that it may be rounded to
    either.
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
