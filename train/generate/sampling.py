"""Chooses tokens from logits, with temperature and top-p. Every row has its own random number generator.

Shapes: B rows, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from conf.errors import UserError


@dataclass(frozen=True)
class Sampler:
    """Settings and methods that turn logits into a distribution over tokens."""

    vocab_size: int
    """Number of valid token ids; the head may have more rows."""
    temperature: float = 0.8
    """Divisor of the logits. With 0, the most likely token is chosen."""
    top_p: float = 1.0
    """Tokens are drawn from the smallest set of tokens whose total probability is at least this value."""

    def __post_init__(self):
        for field, value, fits, rule in (
            ("temperature", self.temperature, 0 <= self.temperature < torch.inf, "must be a finite number, 0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "must be above 0, and at most 1"),
        ):
            if not fits:
                raise UserError(field, value, rule, "correct it, or leave it out")

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Return the log-softmax before the top-p cut; 0 at temperature 0."""
        logits = logits[..., : self.vocab_size]
        return torch.zeros_like(logits) if self.temperature == 0 else (logits / self.temperature).log_softmax(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the distributions that tokens are drawn from, fp32 (..., V)."""
        logits = logits[..., : self.vocab_size]
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1)
        p = (logits / self.temperature).softmax(-1)
        if self.top_p == 1:
            return p
        ordered, ids = p.sort(dim=-1, descending=True, stable=True)
        ordered = ordered.masked_fill_(ordered.cumsum(-1) - ordered >= self.top_p, 0)
        p = torch.zeros_like(p).scatter_(-1, ids, ordered)
        return p.div_(p.sum(-1, keepdim=True))


def uniforms(generators: list[torch.Generator], device: torch.device) -> Tensor:
    """Return a random number in [0, 1) for each row, (B,)."""
    return torch.cat([torch.rand(1, generator=generator) for generator in generators]).to(device)


def draw(p_BV: Tensor, u_B: Tensor) -> Tensor:
    """Return each row's token at cumulative probability u_B, (B,)."""
    cumulated_BV = p_BV.double().cumsum(-1)  # fp32 would lose rare tokens of a large vocabulary
    targets_B1 = u_B.double().unsqueeze(-1) * cumulated_BV[:, -1:]
    return torch.searchsorted(cumulated_BV, targets_B1, right=True).squeeze(-1)
