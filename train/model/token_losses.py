"""Defines losses of tokens, which are functions of log-probabilities and of other tensors in the batch.

A loss is a function `loss(logprobs_BT, tokens, **settings)` that returns the loss of every token, (B, T), with
gradient. The engine accepts the losses of this file by name, and your own function. It multiplies each token's loss by
the token's weight, sums over the learnt (supervised) tokens of a step, and divides by their number.

All functions get complete sequences, even if ranks share sequences. At tokens that are not learnt, log-probabilities
are 0, and the result is ignored. The formulas below use:

    r = exp(logprob - old_logprob)     a token's probability / its probability under the sampling policy
    A                                  advantage of the token

Shapes: B sequences, T positions, where position t predicts token t + 1. The batch's tensors are (B, T + 1).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from conf.errors import UserError


@dataclass(frozen=True)
class LossTokens:
    """The tokens of a batch, and the batch's tensors for them."""

    learnt_BT: Tensor
    """Whether a token is learnt, bool."""
    samples_BT: Tensor
    """Index of each token's sample in the sequence; -1 for padding."""
    tensors: Mapping[str, Tensor]
    """The tensors of the batch by name, each (B, T)."""

    def __getitem__(self, name: str) -> Tensor:
        """Return the batch's tensor, or raise UserError if it is missing."""
        if name not in self.tensors:
            given = ", ".join(self.tensors) or "none"
            raise UserError("batch.tensors", given, f"must have `{name}`, which the loss needs", "add it to the batch")
        return self.tensors[name]

    def mean_of_samples(self, x_BT: Tensor) -> Tensor:
        """Return, for each token, the mean of x over the learnt tokens of the token's sample: (B, T)."""
        samples_BT = self.samples_BT.clamp_min(0)
        shape = len(x_BT), int(samples_BT.max()) + 1
        learnt_BT = self.learnt_BT.to(x_BT.dtype)
        sums_BN = x_BT.new_zeros(shape).scatter_add(1, samples_BT, x_BT.where(self.learnt_BT, 0))
        counts_BN = x_BT.new_zeros(shape).scatter_add(1, samples_BT, learnt_BT)
        return (sums_BN / counts_BN.clamp_min(1)).gather(1, samples_BT)


TokenLoss = Callable[..., Tensor]
"""A loss of tokens; see the top of this file."""


def negative_logprob(logprobs_BT: Tensor, tokens: LossTokens) -> Tensor:
    """Returns -logprob, the cross-entropy of pretraining and supervised fine-tuning.

    Without weights and temperatures, the output head computes it directly.
    """
    return -logprobs_BT


def importance_sampling(logprobs_BT: Tensor, tokens: LossTokens) -> Tensor:
    """Returns -r A (see the top of this file), the policy gradient for tokens of another policy.

    Needs the tensors advantages and old_logprobs.
    """
    return -_ratio(logprobs_BT, tokens) * tokens["advantages"]


def ppo(logprobs_BT: Tensor, tokens: LossTokens, clip: float = 0.2, clip_high: float | None = None) -> Tensor:
    """Returns the PPO loss -min(r A, clip(r, 1 - clip, 1 + clip_high) A) (arXiv 1707.06347, eq. 7).

    clip_high: None: as `clip`; DAPO uses a larger value (arXiv 2503.14476). Needs the tensors advantages and
    old_logprobs.
    """
    return _clipped(_ratio(logprobs_BT, tokens), tokens["advantages"], clip, clip_high)


def cispo(logprobs_BT: Tensor, tokens: LossTokens, clip: float = 1.0, clip_high: float = 2.0) -> Tensor:
    """Returns -stopgrad(clip(r, 1 - clip, 1 + clip_high)) A logprob (MiniMax-M1, arXiv 2506.13585, eq. 4).

    r is clipped, but every token has a gradient. With clip = 1 there is no lower bound, as in the paper. Needs the
    tensors advantages and old_logprobs.
    """
    weights_BT = _ratio(logprobs_BT, tokens).detach().clamp(1 - clip, 1 + clip_high)
    return -weights_BT * tokens["advantages"] * logprobs_BT


def gspo(logprobs_BT: Tensor, tokens: LossTokens, clip: float = 3e-4, clip_high: float | None = 4e-4) -> Tensor:
    """Returns -min(s A, clip(s, 1 - clip, 1 + clip_high) A), where s is the geometric mean of r over the sample's
    learnt tokens (arXiv 2507.18071, eq. 5 to 7, bounds from 5.1).

    Every learnt token has the loss of its sample, so a longer sample has a larger weight. Needs the tensors advantages
    (equal for all tokens of a sample) and old_logprobs. r, A: see the top of this file.
    """
    ratio_BT = tokens.mean_of_samples(logprobs_BT - tokens["old_logprobs"]).exp()
    return _clipped(ratio_BT, tokens["advantages"], clip, clip_high)


def kl(logprobs_BT: Tensor, tokens: LossTokens) -> Tensor:
    """Returns exp(d) - d - 1 with d = ref_logprob - logprob (DeepSeekMath, arXiv 2402.03300, eq. 4).

    For sampled tokens, it is an unbiased, nonnegative estimate of the KL divergence from a reference policy. Needs the
    tensor ref_logprobs.
    """
    difference_BT = tokens["ref_logprobs"] - logprobs_BT
    return difference_BT.exp() - difference_BT - 1


TOKEN_LOSSES: dict[str, TokenLoss] = {
    "cross_entropy": negative_logprob,
    **{loss.__name__: loss for loss in (importance_sampling, ppo, cispo, gspo, kl)},
}
"""The losses that the engine accepts by name."""
_POLICY = ("advantages", "old_logprobs")
NEEDED_TENSORS: dict[TokenLoss, tuple[str, ...]] = {
    **dict.fromkeys((importance_sampling, ppo, cispo, gspo), _POLICY),
    kl: ("ref_logprobs",),
}
"""For each loss function: the batch tensors that it needs."""


def _ratio(logprobs_BT: Tensor, tokens: LossTokens) -> Tensor:
    return (logprobs_BT - tokens["old_logprobs"]).exp()


def _clipped(ratio_BT: Tensor, advantages_BT: Tensor, clip: float, clip_high: float | None) -> Tensor:
    clipped_BT = ratio_BT.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    return -torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
