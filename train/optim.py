"""AdamW with fp32 weights and bf16 moments (paper 3.3.3), on the flat shards that ZeRO hands over."""

import torch
from torch import Tensor, nn

from conf.schema import Optim, Precision

CHUNK = 1 << 18
"""Elements updated at a time on CPU: the scratch of one chunk stays in the cache."""


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay; moments kept in `moments` dtype, arithmetic in fp32.

    A parameter is a flat fp32 tensor: ZeRO's shard of the master weights. Element order does not matter, so that
    any sharding gives the same update bit for bit.
    """

    def __init__(self, groups: list[dict], optim: Optim, moments: torch.dtype):
        beta1, beta2 = optim.betas
        super().__init__(groups, {"lr": optim.lr, "betas": (beta1, beta2), "eps": optim.eps, "weight_decay": 0.0})
        self.moments = moments
        self.updates = 0
        """Updates made before this step; counts bias correction for all groups alike."""

    def allocate(self, param: Tensor) -> dict[str, Tensor]:
        """The two moments of a parameter, made on first use."""
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param, dtype=self.moments)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=self.moments)
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every group that has gradients; `updates` is advanced by the owner, once per step."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.allocate(param)
                size = CHUNK if param.device.type == "cpu" else max(1, param.numel())
                for at in range(0, param.numel(), size):
                    part = slice(at, at + size)
                    _update(
                        param.view(-1)[part],
                        param.grad.view(-1)[part],
                        state["exp_avg"].view(-1)[part],
                        state["exp_avg_sq"].view(-1)[part],
                        group,
                        self.updates + 1,
                    )


def _update(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, group: dict, count: int) -> None:
    beta1, beta2 = group["betas"]
    mean = exp_avg.float() if exp_avg.dtype != torch.float32 else exp_avg
    square = exp_avg_sq.float() if exp_avg_sq.dtype != torch.float32 else exp_avg_sq
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    exp_avg.copy_(mean)
    exp_avg_sq.copy_(square)
    scale = (square / (1 - beta2**count)).sqrt_().add_(group["eps"])
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    weight.addcdiv_(mean, scale, value=-group["lr"] / (1 - beta1**count))


def decays(name: str, param: nn.Parameter) -> bool:
    """Weight decay applies to matrices; gains of norms are vectors and are left out."""
    return param.dim() >= 2


def moments_dtype(precision: Precision) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision.moments]
