"""Tests whether a run's random initial weights have the distributions of the papers.

weights     normal with standard deviation init_std, norm weights 1, biases 0     DeepSeek-V3 (arXiv 2412.19437), 4.2
adapters    A uniform in +-1 / sqrt(inputs), B 0                 LoRA (arXiv 2106.09685), 4.1; A as PEFT initialises it
"""

import math

import torch
from torch import Tensor

from train.prove.recipe_values import Values

DISTANCE = 3.0
"""Bound on `distance`, exceeded in 3 of 10^8 correct cases."""


def constant_of(name: str, dims: int) -> float | None:
    """Returns the initial value of constant weights; None for random ones."""
    if name.endswith(("lora_B", ".bias")):
        return 0.0
    return 1.0 if dims == 1 else None


def shares(config: Values, name: str, weight: Tensor) -> Tensor:
    """Maps random weights to values that are uniform in [0, 1] if the weights have the expected distribution."""
    x = weight.double().flatten()
    if name.endswith("lora_A"):
        return (x * weight.size(-1) ** 0.5 + 1).clamp(0, 2) / 2
    return (1 + torch.special.erf(x / (config.model.init_std * math.sqrt(2)))) / 2


def distance(shares_N: Tensor) -> float:
    """Returns the Kolmogorov distance of N values from the uniform distribution, times sqrt(N)."""
    below, count = shares_N.sort().values, len(shares_N)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    return float(torch.maximum(steps[1:] - below, below - steps[:-1]).max()) * count**0.5


def repeated(weight: Tensor) -> int:
    """Returns the number of rows that equal another row."""
    rows = weight.flatten(0, -2)
    return len(rows) - len(rows.unique(dim=0))
