"""Reference for the token losses of reinforcement learning and distillation, written like the formulas of their papers.

    logprob     log-probability of a token, with its logits divided by the token's temperature
    r           exp(logprob - old_logprob), the ratio to the policy that sampled the token
    A           advantage of a token
    ppo         -min(r A, clip(r) A)                               Schulman et al. 2017, arXiv 1707.06347, eq. 7
    importance_sampling    -r A                                    the same paper, eq. 6
    cispo       -stopgrad(clip(r)) A logprob                       MiniMax-M1, arXiv 2506.13585, eq. 4
    gspo        ppo with the geometric mean of r instead of r      Zheng et al. 2025, arXiv 2507.18071, eq. 5 to 7
    kl          exp(d) - d - 1, d = ref_logprob - logprob          DeepSeekMath, arXiv 2402.03300, eq. 4

A loss is a function of the N learnt tokens of one sample. A step's loss is the weighted sum over all learnt tokens,
divided by their number.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.prove.reference import PlainBatch, PlainModel, Seats

LearntTokens = Mapping[str, Tensor]
"""Maps `logprobs` and the names of other loss inputs to the values at one sample's learnt tokens."""


def ratio(sample: LearntTokens) -> Tensor:
    return (sample["logprobs"] - sample["old_logprobs"]).exp()


def smaller(ratio_N: Tensor, advantages_N: Tensor, low: float, high: float) -> Tensor:
    """Computes -min(r A, clip(r, 1 - low, 1 + high) A) for the probability ratio r and the advantage A."""
    kept_N, clipped_N = ratio_N * advantages_N, ratio_N.clamp(1 - low, 1 + high) * advantages_N
    return -torch.where(clipped_N < kept_N, clipped_N, kept_N)


def importance_sampling(sample: LearntTokens) -> Tensor:
    return -ratio(sample) * sample["advantages"]


def ppo(sample: LearntTokens, clip: float, clip_high: float) -> Tensor:
    return smaller(ratio(sample), sample["advantages"], clip, clip_high)


def cispo(sample: LearntTokens, clip: float, clip_high: float) -> Tensor:
    return -ratio(sample).clamp(1 - clip, 1 + clip_high).detach() * sample["advantages"] * sample["logprobs"]


def gspo(sample: LearntTokens, clip: float, clip_high: float) -> Tensor:
    mean = (sample["logprobs"] - sample["old_logprobs"]).mean().exp()
    return smaller(mean.expand(len(sample["logprobs"])), sample["advantages"], clip, clip_high)


def kl(sample: LearntTokens) -> Tensor:
    difference_N = sample["ref_logprobs"] - sample["logprobs"]
    return difference_N.exp() - difference_N - 1


PLAIN_LOSSES: dict[str, Callable[..., Tensor]] = {
    loss.__name__: loss for loss in (importance_sampling, ppo, cispo, gspo, kl)
}


@dataclass(frozen=True)
class PlainCall:
    """A custom loop's call: the loss over some rows."""

    losses: Mapping[str, Mapping[str, float]]
    """Maps each loss to its settings. All these losses are added."""
    rows: slice


class PolicyModel(PlainModel):
    """The reference model with token losses of this file as main loss. MTP modules keep the cross-entropy.

    - calls: the calls of a step.
    - tensors_BT: inputs of the losses, such as `advantages`, for all targets.
    """

    calls: Sequence[PlainCall] = ()
    tensors_BT: Mapping[str, Tensor]
    made: list[Tensor]
    """The log-probabilities (B, T) of each forward pass."""

    @torch.no_grad()
    def logprobs(self, batch: PlainBatch) -> Tensor:
        """Returns log p(target | earlier tokens) for each position, (B, T)."""
        self.made = []
        self.losses(batch, False)
        return self.made[0]

    def cross_entropy(
        self, state_BTD: Tensor, targets_BT: Tensor, seats: Seats, learnt: int, alone: bool = False
    ) -> Tensor:
        temperatures_BT = self.tensors_BT["temperatures"]
        if targets_BT.shape != temperatures_BT.shape:  # an MTP depth has fewer targets
            return super().cross_entropy(state_BTD, targets_BT, seats, learnt, alone)
        logits_BTV = state_BTD @ self.weights["head.weight"].T / temperatures_BT.unsqueeze(-1)
        logprobs_BT = logits_BTV.log_softmax(-1).gather(-1, targets_BT.unsqueeze(-1)).squeeze(-1)
        self.made.append(logprobs_BT)
        assert seats.samples_BT is not None and seats.learnt_BT is not None
        total = 0 * logprobs_BT.sum()
        for call in self.calls:
            for row in range(len(targets_BT))[call.rows]:
                for sample in seats.samples_BT[row].unique():
                    here_T = seats.learnt_BT[row] & (seats.samples_BT[row] == sample)
                    values = {name: tensor_BT[row][here_T] for name, tensor_BT in self.tensors_BT.items()}
                    values["logprobs"] = logprobs_BT[row][here_T]
                    for name, settings in call.losses.items():
                        total = total + (PLAIN_LOSSES[name](values, **settings) * values["weights"]).sum()
        return total / learnt
