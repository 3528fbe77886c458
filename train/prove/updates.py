"""What the update of each optimizer is held against: its formula in the reference, and how far fp32 may be from that."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from conf.optimizers import ADAMW
from conf.schema import Optim
from train.prove import reference
from train.prove.bounds import UNIT

STEP_ROUNDINGS = 8
"""How many times as many of them a step has as the weight that it is taken from: it is made of both moments."""


@dataclass(frozen=True)
class PlainUpdate:
    """The update of one optimizer."""

    rule: Callable[..., tuple[Tensor, ...]]
    """(optim, lr, update, weight, gradient, *state, decays): the new weight and the new state, as in the reference."""
    size_roundings: Callable[..., list[Tensor]]
    """(optim, lr, update, before, gradient, new): what one rounding of fp32 is of each element of weight and state."""
    roundings: dict[str, int]
    """How many of them at most, of every name of the state. A gradient is multiplied by a factor of a norm that may be off by 16, and its
    square by that factor twice."""


def size_adamw_roundings(
    optim: Optim, lr: float, update: int, before: list[Tensor], gradient: Tensor, new: tuple[Tensor, Tensor, Tensor]
) -> list[Tensor]:
    """What one rounding of fp32 is of each element of weight, mean and mean of squares: of the terms that are summed, as two of
    opposite signs may leave less than either is rounded by.
    """
    (weight, mean, _), unit, (beta1, beta2) = before, UNIT["fp32"], optim.betas
    terms = beta1 * mean.abs() + (1 - beta1) * gradient.abs()
    step = lr * terms / (1 - beta1**update) / ((new[2] / (1 - beta2**update)).sqrt() + optim.eps)
    size = torch.maximum(weight.abs(), new[0].abs())
    return [unit * (size + STEP_ROUNDINGS * step), unit * terms, unit * new[2]]


UPDATES: dict[str, PlainUpdate] = {
    ADAMW: PlainUpdate(reference.adamw, size_adamw_roundings, {"exp_avg": 32, "exp_avg_sq": 64}),
}
