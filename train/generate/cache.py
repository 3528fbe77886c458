"""What MLA keeps of the past (paper 2.1.1): per token and layer one latent, after its norm, and one RoPE key for all heads.

Rows of a batch are padded on the left, so that all prompts end in the same column. A row has a start (its first real column)
and a length (columns that count). New entries are written behind the length, and `commit` says how many of them count: what
is not committed is overwritten next time, which is all that taking back rejected drafts needs. Rows may commit different
numbers. Memory is allocated ahead and doubled when full, so a token costs a constant amount of copying.

Shapes: B rows, T new tokens, S columns, N = B*T, W = kv_rank + rope width of an entry, R rope width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from conf.schema import Model

FIRST_COLUMNS = 256
"""Columns allocated at the start."""


def bytes_per_token(config: Model, item_bytes: int, mtp_depth: int = 0) -> int:
    """Cache of one token over all layers, and over this many MTP modules. 70,272 bytes for DeepSeek-V3 in bf16."""
    return (config.layers + mtp_depth) * (config.kv_rank + config.rope_head_dim) * item_bytes


def multi_head_bytes_per_token(config: Model, item_bytes: int) -> int:
    """Bytes of the cache per token with multi-head attention of the same heads and widths: a key and a value per head."""
    per_head = config.nope_head_dim + config.rope_head_dim + config.v_head_dim
    return config.layers * config.heads * per_head * item_bytes


@dataclass(frozen=True)
class Slots:
    """Where the next T tokens of every row go, and what they may look at."""

    columns_BT: Tensor
    starts_B1: Tensor
    first: int | None
    """The first column, where it is the same in all rows."""
    ends: list[int]
    """For each of the T tokens, the columns that the longest row has by then."""
    padded: bool

    def positions_N(self) -> Tensor:
        """Position in its text of every token; 0 for padding."""
        return (self.columns_BT - self.starts_B1).clamp_(min=0).flatten()

    def mask_BCS(self, queries: slice) -> Tensor | None:
        """Which columns these C tokens see, None for all: from the row's start to itself. Padding sees itself, not nothing."""
        end = self.ends[queries.stop - 1]
        if self.first is not None and not self.padded and queries.stop - queries.start == 1:
            return None
        columns_S = torch.arange(end, device=self.columns_BT.device)
        own_BC1 = self.columns_BT[:, queries].unsqueeze(-1)
        mask_BCS = columns_S <= own_BC1
        if self.padded:
            mask_BCS &= (columns_S >= self.starts_B1.unsqueeze(-1)) | (columns_S == own_BC1)
        return mask_BCS


class LatentCache:
    """The entries of some layers for a batch. starts: padding columns before each row's first token."""

    def __init__(self, config: Model, layers: int, starts: list[int], dtype: torch.dtype, device: torch.device):
        self.starts, self.lengths = list(starts), [0] * len(starts)
        width = config.kv_rank + config.rope_head_dim
        # Zeros: columns that a shorter row has not written yet count as 0, and 0 times what memory held may be NaN.
        self._layers = [
            torch.zeros(len(starts), FIRST_COLUMNS, width, dtype=dtype, device=device) for _ in range(layers)
        ]

    @property
    def nbytes(self) -> int:
        """Memory allocated."""
        return sum(entries.nbytes for entries in self._layers)

    def slots(self, count: int) -> Slots:
        """Room for the next `count` tokens of every row."""
        longest = max(self.lengths)
        self._reserve(longest + count)
        device = self._layers[0].device
        lengths_B1 = torch.tensor(self.lengths, device=device).unsqueeze(1)
        return Slots(
            columns_BT=lengths_B1 + torch.arange(count, device=device),
            starts_B1=torch.tensor(self.starts, device=device).unsqueeze(1),
            first=longest if min(self.lengths) == longest else None,
            ends=list(range(longest + 1, longest + count + 1)),
            padded=max(self.starts) > 0,
        )

    def write(self, layer: int, slots: Slots, new_BTW: Tensor) -> Tensor:
        """Put the new entries of a layer into their slots; all entries up to there, (B, S, W), a view."""
        entries_BSW = self._layers[layer]
        end = slots.ends[-1]
        if slots.first is not None:
            entries_BSW[:, slots.first : end] = new_BTW
        else:
            rows_B1 = torch.arange(new_BTW.size(0), device=new_BTW.device).unsqueeze(1)
            entries_BSW[rows_B1, slots.columns_BT] = new_BTW
        return entries_BSW[:, :end]

    def commit(self, counts: list[int]) -> None:
        """Let the first `counts` of the tokens written last count, row by row; the rest is forgotten."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def keep(self, rows: list[int]) -> None:
        """Let go of all other rows."""
        self.starts, self.lengths = [self.starts[row] for row in rows], [self.lengths[row] for row in rows]
        self._layers = [entries_BSW[rows] for entries_BSW in self._layers]

    def _reserve(self, columns: int) -> None:
        held = self._layers[0].size(1)
        if columns <= held:
            return
        for layer, old in enumerate(self._layers):  # one after the other: only one layer is in memory twice
            new = old.new_zeros(old.size(0), max(columns, 2 * held), old.size(2))
            new[:, :held] = old
            self._layers[layer] = new
