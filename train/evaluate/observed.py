"""Measures, during the forward pass of the loss, the loss by position and the predictions of the MTP modules.

Position i (counted from 1) sees i tokens and predicts the next. A model that uses long text has less loss at late
positions than at early ones. A model whose usable context ends earlier has more. Ranges of positions end at seq_len,
half of it, a quarter and so on. So two evaluations with powers of two as lengths have the same borders.

Depth k at position i and the main model at position i + k predict the same token, i + k + 1. In greedy speculative
decoding the main model accepts a draft exactly if both name the same token. So this agreement on given text estimates
the acceptance rate of depth k (paper 5.4.3: 85 to 90 % for the second token).

Shapes: B sequences, S = T + 1 tokens, T positions (those on this rank if sequences are shared), D width, V vocabulary,
N positions in a row.
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from train.model.deepseek import DeepSeekV3
from train.model.sequence import Positions

RANGES = 6
"""Maximum number of ranges of positions."""
SHORTEST = 32
"""Minimum number of positions in a range; fewer would be noise. Applies if there are several ranges."""


def position_ranges(seq_len: int) -> list[range]:
    """Ranges that cover all positions, from 0, in order: the rest, ..., the quarter before the last half, the last
    half."""
    ends = [seq_len >> halvings for halvings in reversed(range(RANGES))]
    return [range(*ends) for ends in pairwise([0, *(end for end in ends if end >= SHORTEST or end == seq_len)])]


class ObservedChunk:
    """Observes the last chunk of a model; `take` returns the sums of the latest forward pass."""

    def __init__(self, depths: int, seq_len: int, last: DeepSeekV3 | None):
        """last: the chunk with the head; None on a rank without it."""
        self._ends = torch.tensor([positions.stop for positions in position_ranges(seq_len)])
        self._sums = torch.zeros(len(self._ends) + 2 * depths, dtype=torch.float64)
        if last is not None:
            last.observer = partial(self._observe, last)

    def take(self) -> Tensor:
        """Sums of the latest forward pass.

        For each range of positions: the nats of its targets. For each depth: the nats of its targets, and the number of
        positions where it agrees.
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
    """Numbers (T,) of this rank's positions, from 0."""
    return torch.cat([torch.arange(piece.start, piece.stop, device=device) for piece in positions.here])


def read(last: DeepSeekV3, hidden_BTD: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token at each position, and -log p of the target in nats, fp32. Any shapes (..., D) and (...).

    It computes the logits for model.loss_chunk positions at a time.
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
    """Values at all positions, gathered from the ranks that share the sequences."""
    if positions.share is None:
        return own_BT
    rows = [len(piece) for piece in positions.pieces]
    return torch.cat(positions.share.gather_begin(own_BT.unsqueeze(-1), rows).wait(), 1).squeeze(-1)
