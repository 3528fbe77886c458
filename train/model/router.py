"""The router (paper 2.1.2): sigmoid scores, bias for balance, limited groups, sequence-wise balance loss.

    s = sigmoid(W x)                              fp32
    chosen = top_k of (s + bias), inside the top_groups groups whose best group_top_k biased scores sum highest
    gates = route_scale * s[chosen] / sum(s[chosen])

The bias only selects. Equal scores go to the lower index. The sequence-wise loss (eq. 17-20) is
    weight * mean over sequences of sum_i f_i P_i,    P_i = mean_t s_it / sum_j s_jt,
    f_i = experts / (top_k T) * how often i is in the top_k of the *unbiased* s.
Its gradient enters here, with the gate's own: no loss value travels to the last pipeline stage.

Shapes: B sequences, T positions, D width, E experts, K = top_k, G groups.
"""

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from conf.schema import Model
from train.model.needed import gradients_needed
from train.model.recompute import is_repeated, recall, remember
from train.model.sequence import Positions


class RoutingRule(NamedTuple):
    """How experts are chosen and weighed."""

    top_k: int
    groups: int
    top_groups: int
    route_scale: float
    group_top_k: int


class Router(nn.Module):
    """Chooses experts and counts what it chose.

    bias_E (fp32) is state of the run: it is saved and updated, never trained by gradient. balance_weight is set by
    whoever runs the step: alpha / micro-batches. While training, every forward adds to load_E (tokens per expert, int64),
    score_E (sum over sequences of P_i) and balance_loss (its weighted value); `clear` starts a new step. Where ranks share
    sequences, how often an expert is chosen is counted over all of each, and what is added to is this rank's part.
    """

    def __init__(self, config: Model, **factory):
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
        self.balance_weight = 0.0

    def forward(
        self, x_BTD: Tensor, recipe: AbstractContextManager, positions: Positions | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gate values fp32 (B*T, K), differentiable, and expert ids int64 (B*T, K).

        recipe: the context in which saving x costs nothing (`RMSNorm.with_recipe`). positions: those of x; None for all of
        whole sequences.
        """
        positions = positions or Positions(x_BTD.size(1))
        with recipe:
            logits_BTE = _Logits.apply(x_BTD, self.weight)
        counters = (self.load_E, self.score_E, self.balance_loss) if self.training else None
        weight = self.balance_weight if self.training else 0.0
        gates_BTK, ids_BTK = _Route.apply(logits_BTE, self.bias_E, self.rule, weight, counters, positions)
        return gates_BTK.flatten(0, 1), ids_BTK.flatten(0, 1)

    def _apply(self, fn, recurse=True):
        """Move the buffers with the module but never round them: engines call module.bfloat16() and mean the weights."""
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def clear(self) -> None:
        """Start counting a new step."""
        self.load_E.zero_()
        self.score_E.zero_()
        self.balance_loss.zero_()

    def entropy(self) -> Tensor:
        """Entropy in nats of the mean normalised score since `clear`; log(experts) when scores are uniform on average."""
        return torch.special.entr(self.score_E / self.score_E.sum()).sum()


class _Logits(torch.autograd.Function):
    """fp32 product of operands in any format, which saves them as they came."""

    @staticmethod
    def forward(ctx, x: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_ED)
        return F.linear(x.float(), weight_ED.float())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight_ED = ctx.saved_tensors
        x_needed, weight_needed = gradients_needed(ctx)
        dx = (grad @ weight_ED.float()).to(x.dtype) if x_needed else None
        return dx, grad.flatten(0, -2).t() @ x.flatten(0, -2).float() if weight_needed else None


def top_indices(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest of the last axis, largest first; of equal ones the lower index wins."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def choose(biased_BTE: Tensor, rule: RoutingRule) -> Tensor:
    """Expert ids (B, T, K) from biased scores, in the allowed groups only."""
    if rule.top_groups < rule.groups:
        grouped_BTGX = biased_BTE.unflatten(-1, (rule.groups, -1))
        best = grouped_BTGX.topk(rule.group_top_k, dim=-1).values
        group_ids = top_indices(best.sum(-1), rule.top_groups)
        closed_BTG1 = torch.ones_like(best[..., 0], dtype=torch.bool).scatter_(-1, group_ids, False).unsqueeze(-1)
        biased_BTE = grouped_BTGX.masked_fill(closed_BTG1, -torch.inf).flatten(-2)
    return top_indices(biased_BTE, rule.top_k)


def count(ids: Tensor, experts: int) -> Tensor:
    """How often each expert occurs along all but the first axis: int64 (B, E)."""
    ids = ids.flatten(1)
    return ids.new_zeros(ids.size(0), experts).scatter_add_(1, ids, torch.ones_like(ids))


class _Route(torch.autograd.Function):
    """Everything after the logits, with one backward for the gates and the balance loss."""

    @staticmethod
    def forward(ctx, logits_BTE, bias_E, rule: RoutingRule, balance_weight: float, counters, positions: Positions):
        (batch, _, experts), length, share = logits_BTE.shape, positions.length, positions.share
        scores_BTE = logits_BTE.sigmoid()
        ids_BTK = recall()
        if ids_BTK is None:
            ids_BTK = remember(choose(scores_BTE + bias_E, rule))
        chosen_BTK = scores_BTE.gather(-1, ids_BTK)
        factor_BT1 = rule.route_scale / (chosen_BTK.sum(-1, keepdim=True) + 1e-20)
        gates_BTK = chosen_BTK * factor_BT1
        frequency_B1E = total_BT1 = None
        if counters is not None and length > 0:
            total_BT1 = scores_BTE.sum(-1, keepdim=True)
            if balance_weight:
                best_BE = count(top_indices(scores_BTE, rule.top_k), experts)
                best_BE = best_BE if share is None else share.total(best_BE)
                frequency_BE = best_BE * (experts / (rule.top_k * length))
                frequency_B1E = frequency_BE.unsqueeze(1)
            if not is_repeated():
                load_E, score_E, balance_loss = counters
                load_E += count(ids_BTK, experts).sum(0)
                share_BE = ((1 / total_BT1).transpose(1, 2) @ scores_BTE).squeeze(1) / length
                score_E += share_BE.sum(0)
                if balance_weight:
                    balance_loss += balance_weight * (frequency_BE * share_BE).sum() / batch
        ctx.save_for_backward(scores_BTE, ids_BTK, gates_BTK, factor_BT1, frequency_B1E, total_BT1)
        ctx.route_scale = rule.route_scale
        # The gradients of ranks that share sequences are averaged, where each has a part of the loss.
        ctx.balance_weight = balance_weight * (1 if share is None else share.ranks) / (batch * max(length, 1))
        ctx.mark_non_differentiable(ids_BTK)
        return gates_BTK, ids_BTK

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTK: Tensor, _):
        scores_BTE, ids_BTK, gates_BTK, factor_BT1, frequency_B1E, total_BT1 = ctx.saved_tensors
        inner_BT1 = (grad_BTK * gates_BTK).sum(-1, keepdim=True) / ctx.route_scale
        dchosen_BTK = (grad_BTK - inner_BT1) * factor_BT1
        if frequency_B1E is None:
            dscores_BTE = torch.zeros_like(scores_BTE)
        else:
            # d/ds_j of sum_i f_i s_i / S is (f_j - sum_i f_i s_i / S) / S
            mean_BT1 = (scores_BTE @ frequency_B1E.transpose(1, 2)) / total_BT1
            dscores_BTE = (frequency_B1E - mean_BT1) * (ctx.balance_weight / total_BT1)
        dscores_BTE.scatter_add_(-1, ids_BTK, dchosen_BTK)
        return torch.ops.aten.sigmoid_backward(dscores_BTE, scores_BTE), None, None, None, None, None


@torch.no_grad()
def update_bias(bias_E: Tensor, load_E: Tensor, speed: float) -> None:
    """Auxiliary-loss-free balancing (paper 2.1.2), after every step: b_i += speed * sign(mean load - load_i), in place, so that
    the bias of an overloaded expert goes down and that of an underloaded one up. load counts tokens over the whole batch of
    the step. The bias takes part in the choice of experts alone, never in their weights.
    """
    load_E = load_E.to(bias_E.dtype)
    bias_E.add_(torch.sign(load_E.mean() - load_E), alpha=speed)
