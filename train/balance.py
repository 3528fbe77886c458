"""Auxiliary-loss-free load balancing (paper 2.1.2): after every step the bias of an overloaded expert goes down by the
speed, that of an underloaded one up. The bias only takes part in the choice of experts, never in their weights."""

import torch
from torch import Tensor


@torch.no_grad()
def update_bias(bias_E: Tensor, load_E: Tensor, speed: float) -> None:
    """b_i += speed * sign(mean load - load_i), in place; load counts tokens over the whole batch of the step."""
    load_E = load_E.to(bias_E.dtype)
    bias_E.add_(torch.sign(load_E.mean() - load_E), alpha=speed)
