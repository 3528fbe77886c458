"""The weights that a run begins with, as the papers state them: how those that were drawn are held to their distribution.

weights     normal with standard deviation init_std, gains of norms 1        DeepSeek-V3 (arXiv 2412.19437), 4.2
adapters    A uniform in +-1 / sqrt(inputs), B 0                             LoRA (arXiv 2106.09685), 4.1, as PEFT draws A
"""

import math

import torch
from torch import Tensor

from train.prove.recipe_values import Values

DISTANCE = 3.0
"""Kolmogorov's distance times the root of the count that a draw exceeds in 3 of 10^8 cases."""


def constant_of(name: str, dims: int) -> float | None:
    """The value that all elements of a weight begin with; None where they are drawn."""
    if name.endswith("lora_B"):
        return 0.0
    return 1.0 if dims == 1 else None


def shares(config: Values, name: str, weight: Tensor) -> Tensor:
    """For every number of a weight that was drawn, the share of its distribution that lies below."""
    x = weight.double().flatten()
    if name.endswith("lora_A"):
        return (x * weight.size(-1) ** 0.5 + 1).clamp(0, 2) / 2
    return (1 + torch.special.erf(x / (config.model.init_std * math.sqrt(2)))) / 2


def distance(shares_N: Tensor) -> float:
    """Kolmogorov's distance of shares from those that are honest, which are spread evenly, times the root of the count."""
    below, count = shares_N.sort().values, len(shares_N)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    return float(torch.maximum(steps[1:] - below, below - steps[:-1]).max()) * count**0.5


def repeated(weight: Tensor) -> int:
    """Rows of a weight, of all its experts, that are the same as another."""
    rows = weight.flatten(0, -2)
    return len(rows) - len(rows.unique(dim=0))
