"""What is measured on the way beside the loss: at which positions it arises, and how well the MTP modules predict.

Position i (counted from 1) sees i tokens and predicts the next one. A model that uses long text has less loss at late positions
than at early ones; one whose context ends earlier has more. Ranges of positions end at seq_len, at half of it, at a quarter and so
on, so that two evaluations with lengths of powers of two have the same borders.

Depth k at position i and the main model at position i + k predict the same token, i + k + 1. In greedy speculative decoding
the main model accepts a draft exactly where both name the same one, so that this agreement, on given text, stands for
the acceptance rate of depth k (paper 5.4.3: 85 to 90 % for the second token).

Shapes: B sequences, S = T + 1 tokens, T positions (those here, where sequences are shared), D width, V vocabulary, N positions in
a row.
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from train.model.deepseek import DeepSeekV3
from train.model.sequence import Positions

RANGES = 6
"""Ranges of positions, at most."""
SHORTEST = 32
"""Positions of a range at least, where there are several: fewer would be noise."""


def position_ranges(seq_len: int) -> list[range]:
    """All positions, from 0, in order: the last half, the quarter before it, and so on; the first range is the rest."""
    ends = [seq_len >> halvings for halvings in reversed(range(RANGES))]
    return [range(*ends) for ends in pairwise([0, *(end for end in ends if end >= SHORTEST or end == seq_len)])]


class ObservedChunk:
    """Watches the last chunk of a model, wherever it is; sums of the pass before by `take`."""

    def __init__(self, depths: int, seq_len: int, last: DeepSeekV3 | None):
        """last: the chunk with the head, None on a rank that has it not."""
        self._ends = torch.tensor([positions.stop for positions in position_ranges(seq_len)])
        self._sums = torch.zeros(len(self._ends) + 2 * depths, dtype=torch.float64)
        if last is not None:
            last.observer = partial(self._observe, last)

    def take(self) -> Tensor:
        """Sums of the last pass: for each range of positions the nats of its targets; for each depth the nats of its targets and
        the positions where it agrees.
        """
        return self._sums

    @torch.no_grad()
    def _observe(self, last: DeepSeekV3, states: list[Tensor], tokens_BS: Tensor, positions: Positions) -> None:
        named_BT, nats_BT = read(last, states[0], positions.take(tokens_BS, 1))
        sums = list(self._by_range(nats_BT, positions))
        named_BT = _of_whole_sequences(named_BT, positions) if len(states) > 1 else named_BT
        for depth, hidden_BTD in enumerate(states[1:], 1):
            left = positions.shorter(depth)
            draft_BT, nats_BT = read(last, hidden_BTD, left.take(tokens_BS, depth + 1))
            sums += [nats_BT.sum(dtype=torch.float64), (draft_BT == left.take(named_BT, depth)).sum()]
        self._sums = torch.stack([each.double() for each in sums])

    def _by_range(self, nats_BT: Tensor, positions: Positions) -> Tensor:
        nats_T = nats_BT.sum(0, dtype=torch.float64)
        range_T = torch.bucketize(here(positions, nats_T.device), self._ends.to(nats_T.device), right=True)
        return nats_T.new_zeros(len(self._ends)).index_add_(0, range_T, nats_T)


def here(positions: Positions, device: torch.device) -> Tensor:
    """Numbers (T,) of the positions here, from 0."""
    return torch.cat([torch.arange(piece.start, piece.stop, device=device) for piece in positions.here])


def read(last: DeepSeekV3, hidden_BTD: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token at each place, and -log p of the target in nats, fp32, with the logits of model.loss_chunk places at
    a time. Any shapes (..., D) and (...).
    """
    head_VD, chunk = last.head.weight.to(hidden_BTD.dtype), last.config.loss_chunk
    named, nats = [], []
    for hidden_ND, targets_N in zip(
        hidden_BTD.flatten(0, -2).split(chunk), targets_BT.flatten().split(chunk), strict=True
    ):
        logits_NV = (hidden_ND @ head_VD.T).float()
        named.append(logits_NV.argmax(-1))
        nats.append(logits_NV.logsumexp(-1) - logits_NV.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1))
    return torch.cat(named).view(targets_BT.shape), torch.cat(nats).view(targets_BT.shape)


def _of_whole_sequences(own_BT: Tensor, positions: Positions) -> Tensor:
    """Losses at all positions, of which other ranks may have some."""
    if positions.share is None:
        return own_BT
    rows = [len(piece) for piece in positions.pieces]
    return torch.cat(positions.share.gather_begin(own_BT.unsqueeze(-1), rows).wait(), 1).squeeze(-1)
