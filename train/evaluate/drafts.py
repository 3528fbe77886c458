"""How well the MTP modules foretell: their losses, and how often they name the token that the main model names.

Depth k at position i and the main model at position i + k predict the same token, i + k + 1. In greedy speculative decoding
the main model accepts a draft exactly where both name the same one, so that this agreement, on given text, stands for
the acceptance rate of depth k (paper 5.4.3: 85 to 90 % for the second token).

Shapes: B sequences, S = T + 1 tokens, T positions, D width, N positions in a row.
"""

import torch
from torch import Tensor

from train.model.deepseek import DeepSeekV3


class Drafts:
    """Watches the last chunk of a model, wherever it is; sums of the pass before by `take`."""

    def __init__(self, depths: int, last: DeepSeekV3 | None):
        """last: the chunk with the head, None on a rank that has it not."""
        self._last = last
        self._sums = torch.zeros(depths, 2, dtype=torch.float64)
        if last is not None and depths:
            last.observer = self._observe

    def take(self) -> Tensor:
        """Sums of the last pass, flat: for each depth the nats of its targets and the positions where it agrees."""
        return self._sums.flatten()

    @torch.no_grad()
    def _observe(self, states: list[Tensor], tokens_BS: Tensor) -> None:
        head_VD, chunk = self._last.head.weight, self._last.config.loss_chunk
        main_BT = named(states[0], head_VD, chunk)
        for depth, hidden_BTD in enumerate(states[1:], 1):
            nats = self._last.head.loss(hidden_BTD, tokens_BS[:, depth + 1 :], 1)
            agreed = (named(hidden_BTD, head_VD, chunk) == main_BT[:, depth:]).sum()
            self._sums[depth - 1] = torch.stack([nats.double(), agreed.double()])


def named(hidden_BTD: Tensor, head_VD: Tensor, chunk: int) -> Tensor:
    """The likeliest token at each position (B, T), with the logits of `chunk` positions at a time."""
    head_VD = head_VD.to(hidden_BTD.dtype)
    parts = [(hidden_ND @ head_VD.T).argmax(-1) for hidden_ND in hidden_BTD.flatten(0, 1).split(chunk)]
    return torch.cat(parts).view(hidden_BTD.shape[:2])
