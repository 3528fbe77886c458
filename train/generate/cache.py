"""MLA's cache of past tokens (paper 2.1.1): one normed latent and one RoPE key for every token and layer. With sparse
attention, the cache also has the indexer's keys.

Rows are padded on the left, so all prompts end in the same column. New entries are written after the valid columns, and
`commit` makes them valid. A full cache is doubled.

Shapes: B rows, T new tokens, S columns, N = B*T, R rope width, W = kv_rank + R width of a cache entry.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.schema import Model
from conf.thresholds import THRESHOLDS
from train.model.indexer import IndexVectors, best_keys, index_scores
from train.model.sequence import KeyChoices

FIRST_COLUMNS = 256
"""Number of cache columns that are allocated at the start."""


def bytes_per_token(config: Model, item_bytes: int) -> int:
    """Return the bytes of one token in the cache, over all layers."""
    indexers = sum(config.sparse.chooses(layer) for layer in range(config.layers))
    latents = config.layers * (config.kv_rank + config.rope_head_dim)
    return (latents + indexers * config.sparse.head_dim) * item_bytes


def multi_head_bytes_per_token(config: Model, item_bytes: int) -> int:
    """Return the bytes per token of comparable multi-head attention."""
    per_head = config.nope_head_dim + config.rope_head_dim + config.v_head_dim
    return config.layers * config.heads * per_head * item_bytes


@dataclass(frozen=True)
class Slots:
    """Cache columns of the next tokens, and the columns that the next tokens attend to."""

    first: int
    end: int
    starts_B1: Tensor
    padded: bool
    choices: KeyChoices = field(default_factory=KeyChoices)
    """The columns that sparse attention chooses for these tokens."""

    def positions_N(self) -> Tensor:
        """Return each token's position in its text; 0 for padding."""
        columns_T = torch.arange(self.first, self.end, device=self.starts_B1.device)
        return (columns_T - self.starts_B1).clamp_(min=0).flatten()

    def chosen_BCS(self, queries: slice) -> Tensor | None:
        """Return a mask of the columns that `queries` attend to; None if they attend to all columns."""
        chosen_BTK, end = self.choices.chosen_BTK, self.first + queries.stop
        if chosen_BTK is None:
            return self.mask_BCS(queries)
        numbers_BCK = chosen_BTK[:, queries].long()
        mask_BCS = numbers_BCK.new_zeros(*numbers_BCK.shape[:2], end + 1, dtype=torch.bool)
        return mask_BCS.scatter_(-1, numbers_BCK.masked_fill(numbers_BCK < 0, end), True)[..., :end]

    def mask_BCS(self, queries: slice) -> Tensor | None:
        """Return a mask of the columns that are visible to the C new tokens in `queries`; None: every column.

        Padding is visible to itself, because attention fails on a row with an empty mask.
        """
        if not self.padded and queries.stop - queries.start == 1:
            return None
        columns_S = torch.arange(self.first + queries.stop, device=self.starts_B1.device)
        own_C1 = columns_S[self.first + queries.start :].unsqueeze(-1)
        mask_BCS = (columns_S <= own_C1).expand(len(self.starts_B1), -1, -1)
        if self.padded:
            mask_BCS = mask_BCS & ((columns_S >= self.starts_B1.unsqueeze(-1)) | (columns_S == own_C1))
        return mask_BCS


class LatentCache:
    """Cache entries of one batch. starts: padding columns in each row."""

    def __init__(self, config: Model, starts: list[int], dtype: torch.dtype, device: torch.device):
        self.starts, self.length, layers = list(starts), 0, config.layers
        """length: the number of valid columns."""
        width = config.kv_rank + config.rope_head_dim
        widths = [width] * layers + [config.sparse.head_dim * config.sparse.chooses(layer) for layer in range(layers)]
        self._layers = [torch.zeros(len(starts), FIRST_COLUMNS, width, dtype=dtype, device=device) for width in widths]
        self._index = layers

    @property
    def nbytes(self) -> int:
        """Bytes of allocated memory."""
        return sum(entries.nbytes for entries in self._layers)

    def slots(self, count: int) -> Slots:
        """Allocate columns for the next `count` tokens of every row."""
        first, end = self.length, self.length + count
        self._reserve(end)
        starts_B1 = torch.tensor(self.starts, device=self._layers[0].device).unsqueeze(1)
        return Slots(first, end, starts_B1, padded=max(self.starts) > 0)

    def write(self, layer: int, slots: Slots, new_BTW: Tensor) -> Tensor:
        """Write a layer's new entries. Returns all entries so far, (B, S, W)."""
        entries_BSW = self._layers[layer]
        entries_BSW[:, slots.first : slots.end] = new_BTW
        return entries_BSW[:, : slots.end]

    def write_index(self, layer: int, slots: Slots, new_BTI: Tensor) -> Tensor:
        """Write an indexer's new keys. Returns all keys so far, (B, S, I)."""
        return self.write(self._index + layer, slots, new_BTI)

    def commit(self, count: int) -> None:
        """Mark the first `count` new columns as valid."""
        self.length += count

    def keep(self, rows: list[int]) -> None:
        """Drop all rows of the batch except `rows`."""
        self.starts = [self.starts[row] for row in rows]
        self._layers = [entries_BSW[rows] for entries_BSW in self._layers]

    def _reserve(self, columns: int) -> None:
        held = self._layers[0].size(1)
        if columns <= held:
            return
        for layer, old in enumerate(self._layers):  # one layer at a time, so that only one layer is in memory twice
            new = old.new_zeros(old.size(0), max(columns, 2 * held), old.size(2))
            new[:, :held] = old
            self._layers[layer] = new


# MLA's absorbed form (paper 2.1.1; DeepSeek-V2 2.1.2): attention directly on the cached latents.
#
# q_i . k = q_nope_i . (W_UK_i c) + q_rope_i . k_rope = [W_UK_i^T q_nope_i ; q_rope_i] . [c ; k_rope]
# sum_s p_s v_s = sum_s p_s W_UV_i c_s = W_UV_i (sum_s p_s c_s)
#
# So keys and values are never computed. All heads share one key, the cache entry, and one value, the entry's latent
# part. Torch's attention gets the entry as key and as value; the rope part of the result is dropped. The queries of all
# heads are rows of one matmul, which reads the cache once.
#
# Shapes: B rows, T tokens, H heads, S columns of the cache, C kv_rank, R rope width, W = C + R width of a cache entry,
# X = queries * heads.

ABSORBED_ROWS = 2048
"""Maximum number of queries times heads in one attention call."""


def latent_attention(q_BTHW: Tensor, entries_BSW: Tensor, kv_rank: int, scale: float, slots: Slots) -> Tensor:
    """Return attention-weighted sums of latents (B, T, H, C)."""
    length, heads = q_BTHW.shape[1:3]
    step = max(1, ABSORBED_ROWS // heads)
    parts = []
    for first in range(0, length, step):
        queries = slice(first, min(first + step, length))
        parts.append(_block(q_BTHW[:, queries], entries_BSW[:, : slots.first + queries.stop], scale, slots, queries))
    out_BTHW = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return out_BTHW[..., :kv_rank]


def choose_columns(index: IndexVectors, top_k: int, slots: Slots) -> Tensor:
    """Return each query's columns with the largest indexer scores, (B, T, top_k)."""
    q_BTHI, k_BSI, w_BTH = index
    length, heads = q_BTHI.shape[1:3]
    step, parts = max(1, ABSORBED_ROWS // heads), []
    for first in range(0, length, step):
        queries = slice(first, min(first + step, length))
        keys_BSI, mask_BCS = k_BSI[:, : slots.first + queries.stop], slots.mask_BCS(queries)
        rows = zip(q_BTHI[:, queries], keys_BSI, w_BTH[:, queries], strict=True)
        scores_BCS = torch.stack([index_scores(*row, THRESHOLDS.attention_scores) for row in rows])
        if mask_BCS is not None:
            scores_BCS.masked_fill_(~mask_BCS, -torch.inf)
        parts.append(best_keys(scores_BCS, top_k))
    return torch.cat(parts, 1)


def _block(q_BCHW: Tensor, entries_BSW: Tensor, scale: float, slots: Slots, queries: slice) -> Tensor:
    mask_BCS = slots.chosen_BCS(queries)
    mask_B1XS = None if mask_BCS is None else mask_BCS.repeat_interleave(q_BCHW.size(2), 1).unsqueeze(1)
    entries_B1SW = entries_BSW.unsqueeze(1)
    q_B1XW = q_BCHW.flatten(1, 2).unsqueeze(1)
    out_B1XW = F.scaled_dot_product_attention(q_B1XW, entries_B1SW, entries_B1SW, attn_mask=mask_B1XS, scale=scale)
    return out_B1XW.view(q_BCHW.shape)
