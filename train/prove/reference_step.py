"""Reference for the settings and the update of a step.

    settings of a step     learning rate, loss weights and batch size during the run       plan_step
    update                 clip by the global norm, AdamW, average of the weights          clip_factor, adamw,
                                                                                           moving_average
    balance                the routers' biases follow the tokens per expert                move_bias

Section numbers refer to the DeepSeek-V3 report (arXiv 2412.19437).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from train.prove.recipe_values import Values
from train.prove.reference_sparse import is_frozen


@dataclass(frozen=True)
class PlainPlan:
    """The settings of one step."""

    first_sample: int
    batch_size: int
    lr: float
    mtp_weight: float
    bias_speed: float


def plan_step(config: Values, step: int) -> PlainPlan:
    """Returns the settings of one step. step: from 1."""
    return next(islice(plan_steps(config), step - 1, None))


def plan_steps(config: Values) -> Iterator[PlainPlan]:
    """Yields the settings of all steps."""
    sizes = [batch_size(config, index) for index in range(config.steps)]
    optim, before, whole = config.optim, 0, sum(sizes)
    for step, size in enumerate(sizes, 1):
        done = (before + size / 2) / whole
        warmed = 1.0 if optim.warmup_steps == 0 else min(1.0, step / optim.warmup_steps)
        lr = optim.lr * warmed * scheduled(optim.lr_schedule, done)
        yield PlainPlan(before, size, lr, scheduled(optim.mtp_weight, done), scheduled(optim.bias_speed, done))
        before += size


def batch_size(config: Values, index: int) -> int:
    """Returns the number of sequences in a step. index: from 0."""
    optim = config.optim
    if optim.batch_ramp_start is None or index >= optim.batch_ramp_steps:
        return config.batch_size
    share = index / optim.batch_ramp_steps
    grown = optim.batch_ramp_start + (config.batch_size - optim.batch_ramp_start) * share
    return math.floor(grown / optim.batch_ramp_increment) * optim.batch_ramp_increment


def scheduled(phases: list[Values], done: float) -> float:
    """Returns a schedule's value after the fraction `done` of the run."""
    index = next(i for i, phase in enumerate(phases) if done <= phase.until)
    phase, earlier = phases[index], phases[index - 1] if index else None
    start, value = (0.0, phase.value) if earlier is None else (earlier.until, earlier.value)
    part = (done - start) / (phase.until - start)
    if phase.shape == "constant":
        return phase.value
    if phase.shape == "cosine":
        part = (1 - math.cos(math.pi * part)) / 2
    return value + (phase.value - value) * part


def global_norm(gradients_of: dict[str, Tensor]) -> Tensor:
    """Returns the L2 norm over the elements of all gradients."""
    return torch.stack([gradient.square().sum() for gradient in gradients_of.values()]).sum().sqrt()


def clip_factor(norm: float, optim: Values) -> float:
    """Returns the factor that limits the gradient norm to optim.clip."""
    return 1.0 if optim.clip == 0 else min(1.0, optim.clip / (norm + 1e-6))


def adamw(
    optim: Values, lr: float, update: int, weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the weight and both moments after an AdamW update."""
    beta1, beta2 = optim.betas
    mean = beta1 * mean + (1 - beta1) * gradient
    square = beta2 * square + (1 - beta2) * gradient.square()
    step = (mean / (1 - beta1**update)) / ((square / (1 - beta2**update)).sqrt() + optim.eps)
    return weight * (1 - lr * optim.weight_decay * decays(optim, weight)) - lr * step, mean, square


def decays(optim: Values, weight: Tensor) -> bool:
    """Returns whether weight decay applies to the weight. Norm weights decay only with optim.decay_norms."""
    return weight.dim() > 1 or optim.decay_norms


def rate_of(optim: Values, name: str, lr: float) -> float:
    """Returns a weight's learning rate; 0 if frozen."""
    frozen = is_frozen(optim, name) or (optim.freeze_routers and name.endswith(".router.weight"))
    return 0.0 if frozen else lr


def moving_average(before: Tensor, weight: Tensor, decay: float) -> Tensor:
    """Returns the moving average of the weights (paper 3.2.3)."""
    return decay * before + (1 - decay) * weight


def move_bias(bias_E: Tensor, load_E: Tensor, speed: float) -> Tensor:
    """Returns routers' biases after loss-free balancing of one step (paper 2.1.2)."""
    return bias_E + speed * torch.sign(load_E.to(bias_E.dtype).mean() - load_E)
