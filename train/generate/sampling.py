"""From logits to tokens: temperature, top-p, and the exact test of drafted tokens.

A draft d from the drafter's distribution q is accepted with probability min(1, p(d) / q(d)), where p is the model's own
distribution at that position. A draw from max(p - q, 0), normalised, replaces the first rejected draft. If none is
rejected, one more token is drawn from the p after the last draft. The result has distribution p (Leviathan et al.,
arXiv 2211.17192). At temperature 0, p and q are one-hot: a draft is accepted if it is the model's own choice.

Every row draws from its own generator, so its tokens do not depend on the rest of the batch.

Shapes: B rows, K drafts, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampler:
    """How a token is chosen from logits."""

    vocab_size: int
    """Number of valid ids; rows of the head beyond them are never chosen."""
    temperature: float = 0.8
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Keep only the most likely tokens that together have this probability, the last one included."""

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Return the log-softmax at this temperature before any cut, fp32 (..., V); all 0 at temperature 0."""
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


def uniforms(generators: list[torch.Generator], count: int, device: torch.device) -> Tensor:
    """Return numbers in [0, 1), (B, count), each row from its own generator."""
    return torch.stack([torch.rand(count, generator=generator) for generator in generators]).to(device)


def draw(p_BV: Tensor, u_B: Tensor) -> Tensor:
    """Return the token (B,) at which the cumulative probability exceeds u."""
    cumulated_BV = p_BV.double().cumsum(-1)  # fp32 would lose rare tokens of a large vocabulary
    targets_B1 = u_B.double().unsqueeze(-1) * cumulated_BV[:, -1:]
    return torch.searchsorted(cumulated_BV, targets_B1, right=True).squeeze(-1)


def accept_drafts(drafts_BK: Tensor, q_BKV: Tensor, p_BLV: Tensor, u_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of accepted drafts in each row (B,), and the token that follows them (B,).

    p_BLV: the model's distributions at the positions of the K drafts and after them, L = K + 1. u_BL: K numbers for the
    tests, one for the last token.
    """
    drafts_BK1 = drafts_BK.unsqueeze(-1)
    p_BK, q_BK = (x.gather(-1, drafts_BK1).squeeze(-1) for x in (p_BLV[:, :-1], q_BKV))
    accepted_BK = u_BL[:, :-1] * q_BK < p_BK
    counts_B = accepted_BK.long().cumprod(-1).sum(-1)
    places_B11 = counts_B.view(-1, 1, 1).expand(-1, 1, p_BLV.size(-1))
    p_BV = p_BLV.gather(1, places_B11).squeeze(1)
    q_BLV = torch.cat([q_BKV, torch.zeros_like(q_BKV[:, :1])], 1)  # nothing is subtracted after the last draft
    rest_BV = (p_BV - q_BLV.gather(1, places_B11).squeeze(1)).clamp_(min=0)
    rest_BV = torch.where(rest_BV.any(-1, keepdim=True), rest_BV, p_BV)  # if p = q up to rounding
    return counts_B, draw(rest_BV, u_BL[:, -1])
