"""Losses of tokens: functions of their log-probabilities and of tensors that a batch carries beside them.

A loss is a function `loss(logprobs_BT, tokens, **settings)` that gives the loss of every token, (B, T), with gradient. Here or anywhere:
the engine takes those of this file by name, and one of your own as a function. The engine then takes each token's loss times its
weight, adds up the tokens that are learnt, on all ranks and in all calls of a step, and divides by their number.

All functions see whole sequences, also where ranks share them. At a token that is not learnt log-probabilities are 0, and what the
function gives there counts nowhere.

    r = exp(logprob - old_logprob)     the ratio of a token's probability to that under the policy that drew it
    A                                  its advantage

Shapes: B sequences, T positions, of which position t predicts token t + 1; tensors are given per token, (B, T + 1).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from conf.errors import UserError


@dataclass(frozen=True)
class LossTokens:
    """The tokens that a loss is taken of, and what the batch says of each."""

    learnt_BT: Tensor
    """Whether a token is learnt, bool."""
    samples_BT: Tensor
    """Number of the sample in its sequence that a token is of; -1 for filling."""
    tensors: Mapping[str, Tensor]
    """Tensors of the batch by name, (B, T)."""

    def __getitem__(self, name: str) -> Tensor:
        """A tensor of the batch. Raises UserError where it has none of this name."""
        if name not in self.tensors:
            given = ", ".join(self.tensors) or "none"
            raise UserError(
                "batch.tensors", given, f"must have `{name}`, which the loss asks for", "add it to the batch"
            )
        return self.tensors[name]

    def mean_of_samples(self, x_BT: Tensor) -> Tensor:
        """At each token, the mean of x over the learnt tokens of its sample: (B, T)."""
        samples_BT = self.samples_BT.clamp_min(0)
        shape = len(x_BT), int(samples_BT.max()) + 1
        learnt_BT = self.learnt_BT.to(x_BT.dtype)
        sums_BN = x_BT.new_zeros(shape).scatter_add(1, samples_BT, x_BT.where(self.learnt_BT, 0))
        counts_BN = x_BT.new_zeros(shape).scatter_add(1, samples_BT, learnt_BT)
        return (sums_BN / counts_BN.clamp_min(1)).gather(1, samples_BT)


TokenLoss = Callable[..., Tensor]
"""A loss of tokens, see the top of the file."""


def negative_logprob(logprobs_BT: Tensor, tokens: LossTokens) -> Tensor:
    """-logprob, the cross-entropy. What pretraining and supervised tuning minimise; without weights and temperatures the head computes it in one piece."""
    return -logprobs_BT


def importance_sampling(logprobs_BT: Tensor, tokens: LossTokens) -> Tensor:
    """-r A: the policy gradient, corrected for tokens that another policy drew. Tensors: advantages, old_logprobs."""
    return -_ratio(logprobs_BT, tokens) * tokens["advantages"]


def ppo(logprobs_BT: Tensor, tokens: LossTokens, clip: float = 0.2, clip_high: float | None = None) -> Tensor:
    """-min(r A, clip(r, 1 - clip, 1 + clip_high) A) (Schulman et al. 2017, arXiv 1707.06347, eq. 7). clip_high: as clip, unless another
    bound is given (DAPO, arXiv 2503.14476). Tensors: advantages, old_logprobs.
    """
    return _clipped(_ratio(logprobs_BT, tokens), tokens["advantages"], clip, clip_high)


def cispo(logprobs_BT: Tensor, tokens: LossTokens, clip: float = 1.0, clip_high: float = 2.0) -> Tensor:
    """-stopgrad(clip(r, 1 - clip, 1 + clip_high)) A logprob: the weight is clipped, and every token keeps its gradient (MiniMax-M1, arXiv
    2506.13585, eq. 4; clip = 1 bounds nothing from below, as there). Tensors: advantages, old_logprobs.
    """
    weights_BT = _ratio(logprobs_BT, tokens).detach().clamp(1 - clip, 1 + clip_high)
    return -weights_BT * tokens["advantages"] * logprobs_BT


def gspo(logprobs_BT: Tensor, tokens: LossTokens, clip: float = 3e-4, clip_high: float | None = 4e-4) -> Tensor:
    """-min(s A, clip(s, 1 - clip, 1 + clip_high) A) with s = exp(mean over the sample's learnt tokens of logprob - old_logprob), the
    geometric mean of their ratios (Zheng et al. 2025, arXiv 2507.18071, eq. 5 to 7 and the bounds of its 5.1). Every learnt token has
    the loss of its sample, so that samples count by their length. Tensors: advantages, alike over a sample, and old_logprobs.
    """
    ratio_BT = tokens.mean_of_samples(logprobs_BT - tokens["old_logprobs"]).exp()
    return _clipped(ratio_BT, tokens["advantages"], clip, clip_high)


def kl(logprobs_BT: Tensor, tokens: LossTokens) -> Tensor:
    """exp(d) - d - 1 with d = ref_logprob - logprob: an estimate without bias, never below 0, of the KL divergence of the policy from a
    reference, of tokens that the policy drew (DeepSeekMath, arXiv 2402.03300, eq. 4). Tensors: ref_logprobs.
    """
    difference_BT = tokens["ref_logprobs"] - logprobs_BT
    return difference_BT.exp() - difference_BT - 1


TOKEN_LOSSES: dict[str, TokenLoss] = {
    "cross_entropy": negative_logprob,
    **{loss.__name__: loss for loss in (importance_sampling, ppo, cispo, gspo, kl)},
}
"""Losses by the names that the engine takes."""
_POLICY = ("advantages", "old_logprobs")
NEEDED_TENSORS: dict[TokenLoss, tuple[str, ...]] = {
    **dict.fromkeys((importance_sampling, ppo, cispo, gspo), _POLICY),
    kl: ("ref_logprobs",),
}
"""What these take of a batch."""


def _ratio(logprobs_BT: Tensor, tokens: LossTokens) -> Tensor:
    return (logprobs_BT - tokens["old_logprobs"]).exp()


def _clipped(ratio_BT: Tensor, advantages_BT: Tensor, clip: float, clip_high: float | None) -> Tensor:
    clipped_BT = ratio_BT.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    return -torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
