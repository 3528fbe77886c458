"""Mixture of experts (paper 2.1.2): one shared expert plus the routed ones, through a dispatcher.

    y = shared(x) + sum over chosen experts of gate * expert(x)

A dispatcher brings each token to the ranks of its experts and the results back; the gate value acts inside the expert,
so the way back is a plain sum. `LocalDispatcher` is the one for experts that all live here.

Shapes: B sequences, T tokens, D width, F inner width, E experts (here: held by this rank), K experts per token, R rows,
one per token and chosen expert.

The router (paper 2.1.2): sigmoid scores, bias for balance, limited groups, sequence-wise balance loss.

    s = sigmoid(W x)                              fp32; or softmax(W x) over the experts (model.scores)
    chosen = top_k of (s + bias), inside the top_groups groups whose best group_top_k biased scores sum highest
    gates = route_scale * s[chosen] / sum(s[chosen])

The bias only selects. Equal scores go to the lower index. The sequence-wise loss (eq. 17-20) is
    weight * mean over sequences of sum_i f_i P_i,    P_i = mean_t s_it / sum_j s_jt,
    f_i = experts / (top_k T) * how often i is in the top_k of the *unbiased* s.
Where samples share a sequence and are apart, the mean is over samples, and T is that of the sample.
Its gradient enters here, with the gate's own: no loss value travels to the last pipeline stage.

Shapes: B sequences, T positions, D width, E experts, K = top_k, G groups.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from conf.own_code import subclass
from conf.schema import Model, Recompute, ScoreFunction
from train.model.layers import FFN, AddedProduct, LayerPrecision, PackedWeight, open_weight
from train.model.needed import Function, gradients_needed
from train.model.operations import Kernels, RoutingRule
from train.model.recompute import recall, remember
from train.model.sequence import Positions


class Router(nn.Module):
    """Chooses experts and counts what it chose.

    bias_E (fp32) is state of the run: it is saved and updated, never trained by gradient. balance_weight is set by
    whoever runs the step: alpha / micro-batches. frozen: whether the weight learns nothing, set by whoever builds it. While training, every forward adds to load_E (tokens per expert, int64),
    score_E (sum over sequences of P_i) and balance_loss (its weighted value); `clear` starts a new step. Positions that do not
    count (`Positions.counted_BT`) are chosen for and left out of all three. Where ranks share
    sequences, how often an expert is chosen is counted over all of each, and what is added to is this rank's part.
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
        self._kernels = kernels

    def forward(
        self, x_BTD: Tensor, remake: AbstractContextManager, positions: Positions | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gate values fp32 (B*T, K), differentiable, and expert ids int64 (B*T, K).

        remake: the context in which saving x costs nothing (`RMSNorm.with_remake`). positions: those of x; None for all of
        whole sequences.
        """
        positions = positions or Positions(x_BTD.size(1))
        logits_BTE = self.score(x_BTD, remake)
        counters = (self.load_E, self.score_E, self.balance_loss) if self.training else None
        weight = self.balance_weight if self.training else 0.0
        gates_BTK, ids_BTK = self._kernels.route(logits_BTE, self.bias_E, self.rule, weight, counters, positions)
        return gates_BTK.flatten(0, 1), ids_BTK.flatten(0, 1)

    def score(self, x_BTD: Tensor, remake: AbstractContextManager) -> Tensor:
        """What the sigmoid takes, fp32 (B, T, E). A router of the user's own may say otherwise."""
        with remake:
            weight_ED = self.weight.detach() if self.frozen else self.weight
            return _Logits.apply(x_BTD, weight_ED, self._kernels)

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


class _Logits(Function):
    """fp32 product of operands in any format, which saves them as they came."""

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
    """Auxiliary-loss-free balancing (paper 2.1.2), after every step: b_i += speed * sign(mean load - load_i), in place, so that
    the bias of an overloaded expert goes down and that of an underloaded one up. load counts tokens over the whole batch of
    the step. The bias takes part in the choice of experts alone, never in their weights.
    """
    load_E = load_E.to(bias_E.dtype)
    bias_E.add_(torch.sign(load_E.mean() - load_E), alpha=speed)


class RoutedRows(Protocol):
    """Rows that have reached the rank of their experts."""

    rows_RD: Tensor
    """Sorted by local expert."""
    gates_R: Tensor
    """Gate value of every row, fp32."""
    counts_E: Tensor
    """Rows per local expert, int64, on the rows' device."""
    state: Any
    """What the dispatcher needs for the way back."""


class PendingRows(Protocol):
    """A dispatch that is under way."""

    def wait(self) -> RoutedRows:
        """The rows that have reached this rank's experts. Call once."""


class Dispatcher(Protocol):
    """Brings tokens to experts and back. Differentiable in x and gates."""

    def dispatch_begin(self, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, again: Any = None) -> PendingRows:
        """Start to send every token to its K experts. again: `RoutedRows.state` of an earlier dispatch of these tokens, whose
        rows go the same ways."""

    def combine(self, out_RD: Tensor, routed: RoutedRows) -> Tensor:
        """Sum the K results of every token: (T, D)."""


class _Sorted(NamedTuple):
    """The order of rows by expert."""

    order_R: Tensor
    inverse_TK: Tensor
    tokens_R: Tensor
    counts_E: Tensor


@dataclass
class ArrivedRows:
    """Rows that had no way to go."""

    rows_RD: Tensor
    gates_R: Tensor
    counts_E: Tensor
    state: _Sorted

    def wait(self) -> "ArrivedRows":
        return self


class LocalDispatcher:
    """All experts are here: a stable sort by expert, and its inverse. No waiting for the device."""

    def __init__(self, experts: int, kernels: Kernels):
        self._experts, self._kernels = experts, kernels

    def dispatch_begin(
        self, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, again: _Sorted | None = None
    ) -> ArrivedRows:
        return self.dispatch(x_TD, expert_ids_TK, gates_TK, again)

    def dispatch(
        self, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, again: _Sorted | None = None
    ) -> ArrivedRows:
        if again is None:
            order_R, inverse_R, tokens_R, counts_E = self._kernels.sort_by_expert(expert_ids_TK, self._experts)
            again = _Sorted(order_R, inverse_R.view(expert_ids_TK.shape), tokens_R, counts_E)
        rows_RD, gates_R = _Permute.apply(x_TD, gates_TK, again.order_R, again.tokens_R, again.inverse_TK)
        return ArrivedRows(rows_RD, gates_R, again.counts_E, again)

    def combine(self, out_RD: Tensor, routed: RoutedRows) -> Tensor:
        return _Unpermute.apply(out_RD, routed.state.tokens_R, routed.state.inverse_TK)


def _gather_sum(rows_RD: Tensor, inverse_TK: Tensor) -> Tensor:
    """Sum of the K rows of every token."""
    return F.embedding_bag(inverse_TK, rows_RD, mode="sum")  # gathers and adds in one pass, in fp32


class _Permute(Function):
    """Tokens to sorted rows. Both ways gather: no scattered addition, so the sum has one order."""

    @staticmethod
    def forward(ctx, x_TD, gates_TK, order_R, tokens_R, inverse_TK):
        ctx.save_for_backward(inverse_TK)
        return x_TD.index_select(0, tokens_R), gates_TK.flatten().index_select(0, order_R)

    @staticmethod
    @once_differentiable
    def backward(ctx, drows_RD, dgates_R):
        (inverse_TK,) = ctx.saved_tensors
        dgates_TK = dgates_R.index_select(0, inverse_TK.flatten()).view(inverse_TK.shape)
        return _gather_sum(drows_RD, inverse_TK), dgates_TK, None, None, None


class _Unpermute(Function):
    """Sorted rows back to tokens, summed."""

    @staticmethod
    def forward(ctx, out_RD, tokens_R, inverse_TK):
        ctx.save_for_backward(tokens_R)
        return _gather_sum(out_RD, inverse_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD):
        (tokens_R,) = ctx.saved_tensors
        return dy_TD.index_select(0, tokens_R), None, None


class Experts(nn.Module):
    """Weights of the routed experts that this rank holds: w13 (E, 2F, D) rows of w1 then w3, and w2 (E, D, F)."""

    def __init__(self, config: Model, local: range, **factory):
        super().__init__()
        width, inner = config.hidden, config.expert_width
        self.local = local
        self.w13 = nn.Parameter(torch.empty(len(local), 2 * inner, width, **factory))
        self.w2 = nn.Parameter(torch.empty(len(local), width, inner, **factory))
        self.added_up: AddedProduct | None = None
        self.added_down: AddedProduct | None = None
        """The adapters of w13 and of w2, set by whoever trains them."""
        self.packed_up: PackedWeight | None = None
        self.packed_down: PackedWeight | None = None
        """Forms of w13 and of w2 beside an adapter, if they are not the plain one."""


class MoE(nn.Module):
    """Router, routed experts and shared experts of one block. shared_experts act as one FFN of their total width."""

    def __init__(
        self, config: Model, precision: LayerPrecision, dispatcher: Dispatcher, local_experts: range, **factory
    ):
        super().__init__()
        self.router = subclass("model.router", config.router, Router)(config, precision.kernels, **factory)
        self.experts = Experts(config, local_experts, **factory)
        self.shared = None
        if config.shared_experts:
            recompute = Recompute.swiglu in config.recompute
            width = config.shared_experts * config.expert_width
            self.shared = FFN(config.hidden, width, precision, recompute, **factory)
        self._precision, self.dispatcher = precision, dispatcher

    def forward(self, x_BTD: Tensor, remake: AbstractContextManager, positions: Positions | None = None) -> Tensor:
        """remake: the context in which saving x costs nothing (`RMSNorm.with_remake`). Returns (B, T, D)."""
        gates_TK, ids_TK = self.router(x_BTD, remake, positions)
        x_TD = x_BTD.flatten(0, 1)
        pending = self.dispatcher.dispatch_begin(x_TD, ids_TK, gates_TK, recall())
        shared_TD = None if self.shared is None else self.shared(x_TD, remake)  # while the tokens are on their way
        routed = pending.wait()
        remember(routed.state)
        out_RD = self.run_experts(routed)
        y_TD = self.dispatcher.combine(out_RD, routed)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        return y_TD.view(x_BTD.shape)

    def run_experts(self, routed: RoutedRows) -> Tensor:
        """Outputs of the local experts on the rows that came."""
        experts, dtype = self.experts, self._precision.dtype
        added = experts.added_up, experts.added_down
        w13_E2FD, keep_up = open_weight(experts.packed_up, experts.w13, dtype)
        w2_EDF, keep_down = open_weight(experts.packed_down, experts.w2, dtype)
        with keep_up, keep_down:
            return self._precision.expert_ffn(routed.rows_RD, routed.gates_R, w13_E2FD, w2_EDF, routed.counts_E, added)
