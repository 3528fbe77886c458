"""Formulas of all optimizers' updates, with bounds on rounding errors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from train.prove import reference_muon, reference_step
from train.prove.bounds import UNIT
from train.prove.recipe_values import Values

STEP_ROUNDINGS = 8
"""Number of fp32 roundings in the change that AdamW computes."""


NEWTON_SCHULZ_ROUNDINGS = 4
"""Number of fp32 roundings in a Newton-Schulz step."""


class WeightUpdate(NamedTuple):
    """The update of one weight in one step."""

    config: Values
    name: str
    lr: float
    number: int
    """Index of the update in the run, from 1."""


@dataclass(frozen=True)
class PlainUpdate:
    """The formula of an update, and its rounding errors."""

    make: Callable[..., tuple[Tensor, ...]]
    """Takes (WeightUpdate, weight, gradient, *state); returns new weight and state."""
    size_roundings: Callable[..., list[Tensor]]
    """Takes (WeightUpdate, before, gradient, new); returns the magnitude of one rounding error for each element."""
    roundings: dict[str, int]
    """Maximum number of fp32 roundings for each kind of optimizer state, of which the clip factor causes half. The
    second moment has twice as many roundings as the first, because it contains squared gradients."""
    is_whole: bool = False
    """Whether an update needs complete matrices. Then the check repeats the update in fp64."""


def make_adamw(one: WeightUpdate, weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor) -> tuple[Tensor, ...]:
    """Computes an AdamW update by the reference's formula."""
    return reference_step.adamw(one.config.optim, one.lr, one.number, weight, gradient, mean, square)


def size_adamw_roundings(
    one: WeightUpdate, before: list[Tensor], gradient: Tensor, new: tuple[Tensor, Tensor, Tensor]
) -> list[Tensor]:
    """Returns the magnitude of one fp32 rounding error for each element of the weight and of both moments.

    The error is proportional to the magnitudes of a sum's terms, which may cancel.
    """
    optim, lr = one.config.optim, one.lr
    (weight, mean, _), unit, (beta1, beta2) = before, UNIT["fp32"], optim.betas
    terms = beta1 * mean.abs() + (1 - beta1) * gradient.abs()
    step = lr * terms / (1 - beta1**one.number) / ((new[2] / (1 - beta2**one.number)).sqrt() + optim.eps)
    size = torch.maximum(weight.abs(), new[0].abs())
    return [unit * (size + STEP_ROUNDINGS * step), unit * terms, unit * new[2]]


def make_muon(one: WeightUpdate, weight: Tensor, gradient: Tensor, momentum: Tensor) -> tuple[Tensor, ...]:
    """Computes a Muon update by the reference's formula."""
    return reference_muon.muon(one.config, one.name, one.lr, weight, gradient, momentum)


def size_muon_roundings(
    one: WeightUpdate, before: list[Tensor], gradient: Tensor, new: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """Returns the magnitude of one fp32 rounding error for each element of weight and momentum.

    Newton-Schulz enlarges an error most along the smallest singular value, which may change any element. So all
    elements of a matrix have the same bound.
    """
    (weight, momentum), unit, muon = before, UNIT["fp32"], one.config.optim.muon
    terms = muon.momentum * momentum.abs() + gradient.abs()
    moved, ahead = torch.empty_like(weight), gradient + muon.momentum * new[1]
    matrices = (reference_muon.split_matrices(one.config, one.name, each) for each in (moved, ahead))
    for size, matrix in zip(*matrices, strict=True):
        singular = torch.linalg.svdvals(matrix / matrix.norm().clamp_min(1e-300))
        steps = reference_muon.NEWTON_SCHULZ[muon.iteration]
        slope = max(_slope(float(value), steps) for value in (singular[0], singular[-1]))
        size.fill_(one.lr * 0.2 * max(matrix.shape) ** 0.5 * NEWTON_SCHULZ_ROUNDINGS * len(steps) * slope)
    return [unit * (torch.maximum(weight.abs(), new[0].abs()) + moved), unit * terms]


def _slope(singular: float, steps: list[tuple[float, float, float]]) -> float:
    """Returns the factor by which Newton-Schulz multiplies a singular value."""
    x = max(singular, 1e-12)
    for a, b, c in steps:
        x = a * x + b * x**3 + c * x**5
    return abs(x) / max(singular, 1e-12)


UPDATES: dict[str, PlainUpdate] = {
    "adamw": PlainUpdate(make_adamw, size_adamw_roundings, {"exp_avg": 32, "exp_avg_sq": 64}),
    "muon": PlainUpdate(make_muon, size_muon_roundings, {"momentum": 32}, is_whole=True),
}


def update_of(config: Values, name: str, dims: int) -> tuple[PlainUpdate, tuple[str, ...]]:
    """Returns a weight's update formula and kinds of optimizer state."""
    by_muon = config.optim.name == "muon" and reference_muon.is_matrix(name, dims)
    formula = UPDATES["muon" if by_muon else "adamw"]
    return formula, tuple(formula.roundings)
