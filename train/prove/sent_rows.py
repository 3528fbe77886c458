"""Computes dispatch and combine of rows as the paper defines them (arXiv 2412.19437, 3.3.2 and 3.3.3), for
`mode=prove`.

    dispatch   "we ... quantize the activation before MoE up-projections into FP8 and then apply dispatch"; "a similar
               strategy is applied to the activation gradient before MoE down-projections"; the scales are "integral
               powers of 2".
    combine    "for both the forward and backward combine components, we retain them in BF16".

The functions compute in fp64 without Sluice's code.

Shapes: R rows, D channels, T tokens, K experts of a token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from train.prove.low_precision import FORMATS, NearNumbers, Rule, cast, nearest

BF16 = FORMATS["bf16"]
ACTIVATION_FLOOR, GRADIENT_FLOOR = 1e-4, 1e-12
"""Lower limits of the magnitude from which the scale of a tile is computed."""


def sent_in_fp8(x_RD: Tensor, floor: float) -> Tensor:
    """Returns the rows that a rank receives in FP8.

    Each tile is divided by a power-of-two scale, rounded to E4M3, and multiplied by the scale (paper 3.3.2).
    """
    return cast(NearNumbers(x_RD.double()), Rule(FORMATS["e4m3"], "1x128", True, floor), -1).x


def summed_rows(
    rows_TKD: Tensor, ids_TK: Tensor, hops: Sequence[int], in_bf16: bool, by_addition: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns the sum of the K rows of every token, and its possible error. Both are (T, D).

    - ids_TK: the expert of each row.
    - hops: sizes of the groups of experts whose rows are added before they reach the token's rank, such as [experts per
      rank, experts per node].
    - in_bf16: whether each sum is rounded to bf16.
    - by_addition: whether the token's rank may also round after each addition.
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
