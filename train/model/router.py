"""The router (paper 2.1.2), with sigmoid scores, balance biases, limited groups and a sequence-wise balance loss.

    s = sigmoid(W x)                              fp32; or softmax(W x) over the experts (model.scores)
    chosen = the experts with the top_k largest s + bias, among the experts of the chosen groups
    gates = route_scale * s[chosen] / sum(s[chosen])

The chosen groups are the top_groups groups with the largest sum of s + bias over their best group_top_k experts. Of
equal scores, the lower index wins. The sequence-wise loss (paper eq. 17-20) is

    weight * mean over sequences of sum_i f_i P_i,    P_i = mean_t s_it / sum_j s_jt,
    f_i = experts / (top_k T) * how often i is in the top_k of the *unbiased* s.

If a sequence contains separate samples, the mean is over samples, and T is a sample's length. The router adds this
loss's gradient to the gradient of the gates.

Shapes: B sequences, T positions, D width, E experts, K = top_k, G groups.
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from conf.schema import Model, ScoreFunction
from train.model.needed import Function, gradients_needed, once_differentiable
from train.model.operations import Kernels, RoutingRule
from train.model.sequence import Positions


class Router(nn.Module):
    """Chooses experts and counts its choices.

    bias_E (fp32) is part of the run's state: checkpoints store it, and `update_bias` changes it. `balance_weight` is
    alpha divided by the number of micro-batches, set before each step. `frozen`: whether training leaves the router's
    weight unchanged.

    In training, every forward adds to three sums, which `clear` sets to 0:
    - load_E: tokens per expert, int64.
    - score_E: sum over sequences of P_i.
    - balance_loss: already multiplied by its weight.

    Positions whose target is in another sample (`Positions.counted_BT`) are routed but not counted. If ranks share
    sequences, f_i covers complete sequences, and each rank adds its own positions.
    """

    bias_E: Tensor
    load_E: Tensor
    score_E: Tensor
    balance_loss: Tensor

    def __init__(self, config: Model, kernels: Kernels, **factory):
        super().__init__()
        device = factory.get("device")
        self.weight = nn.Parameter(torch.empty(config.experts, config.hidden, **factory))
        self.register_buffer("bias_E", torch.zeros(config.experts, dtype=torch.float32, device=device))
        for name, shape, dtype in (
            ("load_E", config.experts, torch.int64),
            ("score_E", config.experts, torch.float32),
            ("balance_loss", (), torch.float32),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        limit = config.groups, config.top_groups
        self.rule = RoutingRule(config.top_k, *limit, config.route_scale, config.resolved_group_top_k)
        self.rule = self.rule._replace(softmax=config.scores == ScoreFunction.softmax)
        self.balance_weight, self.frozen = 0.0, False
        self.layer: int | None = None
        """Index among the main model's MoE layers, set by the model; None in an MTP module."""
        self._kernels = kernels

    def forward(
        self, x_BTD: Tensor, remake: AbstractContextManager, positions: Positions | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return gate values fp32 (B*T, K), differentiable, and expert ids int64 (B*T, K).

        remake: context manager inside which autograd does not save x; backward recomputes x.
        positions: None for complete sequences.
        """
        positions = positions or Positions(x_BTD.size(1))
        logits_BTE = self.score(x_BTD, remake)
        counters = (self.load_E, self.score_E, self.balance_loss) if self.training else None
        weight = self.balance_weight if self.training else 0.0
        replayed_BTK = None
        if positions.experts_here_BTLK is not None and self.layer is not None:
            replayed_BTK = positions.experts_here_BTLK[:, :, self.layer]
        given = logits_BTE, self.bias_E, self.rule, weight, counters, positions
        gates_BTK, ids_BTK = self._kernels.route(*given, replayed_BTK)
        return gates_BTK.flatten(0, 1), ids_BTK.flatten(0, 1)

    def score(self, x_BTD: Tensor, remake: AbstractContextManager) -> Tensor:
        """Return the logits, fp32 (B, T, E). A user's router may override this."""
        with remake:
            weight_ED = self.weight.detach() if self.frozen else self.weight
            return exact_matmul(x_BTD, weight_ED, self._kernels)

    def _apply(self, fn, recurse=True):
        """Apply `fn`, as in module.to() and module.bfloat16(), but keep the dtype of the buffers.

        Engines call module.bfloat16() to convert the weights. This call must not round the buffers.
        """
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def clear(self) -> None:
        """Set load_E, score_E and balance_loss to 0 for a new step."""
        self.load_E.zero_()
        self.score_E.zero_()
        self.balance_loss.zero_()

    def entropy(self) -> Tensor:
        """Return the entropy (nats) of the experts' mean scores since `clear`; log(experts) if all are equal."""
        return torch.special.entr(self.score_E / self.score_E.sum()).sum()


def exact_matmul(x_BTD: Tensor, weight_ED: Tensor, kernels: Kernels) -> Tensor:
    """Return x W^T in fp32, for operands of any dtype: (B, T, E). Differentiable."""
    return _Logits.apply(x_BTD, weight_ED, kernels)


class _Logits(Function):
    """Multiplies operands of any dtype in fp32, and saves them unchanged."""

    @staticmethod
    def forward(ctx, x_BTD: Tensor, weight_ED: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(x_BTD, weight_ED)
        ctx.kernels = kernels
        return kernels.logits(x_BTD.flatten(0, 1), weight_ED).view(*x_BTD.shape[:2], len(weight_ED))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x_BTD, weight_ED = ctx.saved_tensors
        needed = gradients_needed(ctx)[:2]
        dx_ND, dweight_ED = ctx.kernels.logits_backward(grad.flatten(0, 1), x_BTD.flatten(0, 1), weight_ED, *needed)
        return None if dx_ND is None else dx_ND.view(x_BTD.shape), dweight_ED, None


@torch.no_grad()
def update_bias(bias_E: Tensor, load_E: Tensor, speed: float) -> None:
    """Update the biases after a step: b_i += speed * sign(mean load - load_i), in place (paper 2.1.2).

    load_E: tokens per expert in the step's batch, over all ranks.
    """
    load_E = load_E.to(bias_E.dtype)
    bias_E.add_(torch.sign(load_E.mean() - load_E), alpha=speed)
