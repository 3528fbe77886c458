"""MLA's absorbed form (paper 2.1.1; DeepSeek-V2 2.1.2): attention on the cached latents themselves.

    q_i . k = q_nope_i . (W_UK_i c) + q_rope_i . k_rope = [W_UK_i^T q_nope_i ; q_rope_i] . [c ; k_rope]
    sum_s p_s v_s = sum_s p_s W_UV_i c_s = W_UV_i (sum_s p_s c_s)

So keys and values are never formed: all heads share one key, the cache entry, and one value, its latent part. Torch's
attention takes the entry for both; the rope part of its result is dropped. Heads are rows of one product, which reads the
cache once for all of them.

Shapes: B rows, T tokens, H heads, S columns of the cache, W = C + R entry, C kv_rank, R rope width; X = queries * heads.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from train.generate.cache import Slots

ABSORBED_ROWS = 2048
"""Queries times heads that meet the cache at a time, which bounds the mask of a long prompt."""


def latent_attention(q_BTHW: Tensor, entries_BSW: Tensor, kv_rank: int, scale: float, slots: Slots) -> Tensor:
    """Weighted sums of latents (B, T, H, C) for queries that carry W_UK already."""
    length, heads = q_BTHW.shape[1:3]
    step = max(1, ABSORBED_ROWS // heads)
    parts = []
    for first in range(0, length, step):
        queries = slice(first, min(first + step, length))
        parts.append(_block(q_BTHW[:, queries], entries_BSW[:, : slots.ends[queries.stop - 1]], scale, slots, queries))
    out_BTHW = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return out_BTHW[..., :kv_rank]


def _block(q_BCHW: Tensor, entries_BSW: Tensor, scale: float, slots: Slots, queries: slice) -> Tensor:
    mask_BCS = slots.mask_BCS(queries)
    mask_B1XS = None if mask_BCS is None else mask_BCS.repeat_interleave(q_BCHW.size(2), 1).unsqueeze(1)
    entries_B1SW = entries_BSW.unsqueeze(1)
    q_B1XW = q_BCHW.flatten(1, 2).unsqueeze(1)
    out_B1XW = F.scaled_dot_product_attention(q_B1XW, entries_B1SW, entries_B1SW, attn_mask=mask_B1XS, scale=scale)
    return out_B1XW.view(q_BCHW.shape)
