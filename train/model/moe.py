"""Mixture of experts (paper 2.1.2): shared experts, and routed experts that receive their tokens from a dispatcher.

    y = shared(x) + sum over chosen experts of gate * expert(x)

A dispatcher sends each token to the ranks of its chosen experts, and returns the sum of the experts' results. Experts
multiply their results by the gate value, so combine only adds.

Shapes: B sequences, T tokens, D width, F inner width, E experts of this rank, K experts per token, R rows: one for each
token and chosen expert.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from conf.own_code import subclass
from conf.schema import Model, Recompute
from train.model.layers import FFN, AddedMatmul, LayerPrecision, PackedWeight, open_weight
from train.model.needed import Function, once_differentiable
from train.model.operations import Kernels
from train.model.recompute import recall, remember
from train.model.router import Router
from train.model.sequence import Positions


class RoutedRows(Protocol):
    """Rows that have arrived at the rank that has their experts."""

    rows_RD: Tensor
    """The rows, sorted by local expert."""
    gates_R: Tensor
    """Gate value of every row, fp32."""
    counts_E: Tensor
    """Number of rows of each local expert, int64, on the device."""
    state: Any
    """Data that the dispatcher needs for combine."""


class PendingRows(Protocol):
    """A dispatch in progress."""

    def wait(self) -> RoutedRows:
        """Wait for the rows of this rank's experts. Call this once."""


class Dispatcher(Protocol):
    """Dispatches tokens to experts, and combines results. Differentiable."""

    def dispatch_begin(self, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, again: Any = None) -> PendingRows:
        """Start to send every token to its K experts.

        again: `RoutedRows.state` of an earlier dispatch of the same tokens, whose routes are used again.
        """

    def combine(self, out_RD: Tensor, routed: RoutedRows) -> Tensor:
        """Return the sum of every token's K expert results: (T, D)."""


class _Sorted(NamedTuple):
    """Describes how (token, expert) entries are sorted into rows by expert."""

    order_R: Tensor
    inverse_TK: Tensor
    tokens_R: Tensor
    counts_E: Tensor


@dataclass
class ArrivedRows:
    """The rows that `LocalDispatcher` returns. `wait` returns at once."""

    rows_RD: Tensor
    gates_R: Tensor
    counts_E: Tensor
    state: _Sorted

    def wait(self) -> "ArrivedRows":
        return self


class LocalDispatcher:
    """Dispatches tokens to local experts by a stable sort, without waiting for the device."""

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
        rows_RD, gates_R = _Permute.apply(x_TD, gates_TK, again, self._kernels)
        return ArrivedRows(rows_RD, gates_R, again.counts_E, again)

    def combine(self, out_RD: Tensor, routed: RoutedRows) -> Tensor:
        return _Unpermute.apply(out_RD, routed.state, self._kernels)


class _Permute(Function):
    """Maps tokens to rows sorted by expert. Forward and backward use gathers, so sums have a fixed order."""

    @staticmethod
    def forward(ctx, x_TD, gates_TK, order: _Sorted, kernels: Kernels):
        ctx.save_for_backward(order.inverse_TK)
        ctx.kernels = kernels
        return x_TD.index_select(0, order.tokens_R), gates_TK.flatten().index_select(0, order.order_R)

    @staticmethod
    @once_differentiable
    def backward(ctx, drows_RD, dgates_R):
        (inverse_TK,) = ctx.saved_tensors
        dgates_TK = dgates_R.index_select(0, inverse_TK.flatten()).view(inverse_TK.shape)
        return ctx.kernels.sum_entries(drows_RD, inverse_TK), dgates_TK, None, None


class _Unpermute(Function):
    """Sums the sorted rows of each token."""

    @staticmethod
    def forward(ctx, out_RD, order: _Sorted, kernels: Kernels):
        ctx.save_for_backward(order.tokens_R)
        return kernels.sum_entries(out_RD, order.inverse_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD):
        (tokens_R,) = ctx.saved_tensors
        return dy_TD.index_select(0, tokens_R), None, None


class Experts(nn.Module):
    """This rank's routed experts: w13 (E, 2F, D), w1 before w3, and w2 (E, D, F)."""

    def __init__(self, config: Model, local: range, **factory):
        super().__init__()
        width, inner = config.hidden, config.expert_width
        self.local = local
        self.w13 = nn.Parameter(torch.empty(len(local), 2 * inner, width, **factory))
        self.w2 = nn.Parameter(torch.empty(len(local), width, inner, **factory))
        self.added_up: AddedMatmul | None = None
        self.added_down: AddedMatmul | None = None
        """Adapters of w13 (`added_up`) and w2 (`added_down`), if any."""
        self.packed_up: PackedWeight | None = None
        self.packed_down: PackedWeight | None = None
        """Stored forms of the frozen w13 (`packed_up`) and w2 (`packed_down`), if not plain tensors."""


class MoE(nn.Module):
    """Router, routed experts, and one FFN for shared experts."""

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
        """Return the output (B, T, D).

        remake: context manager inside which autograd does not save x; backward recomputes x.
        """
        gates_TK, ids_TK = self.router(x_BTD, remake, positions)
        x_TD = x_BTD.flatten(0, 1)
        pending = self.dispatcher.dispatch_begin(x_TD, ids_TK, gates_TK, recall())
        shared_TD = None if self.shared is None else self.shared(x_TD, remake)  # runs while the dispatch is in progress
        routed = pending.wait()
        remember(routed.state)
        out_RD = self.run_experts(routed)
        y_TD = self.dispatcher.combine(out_RD, routed)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        return y_TD.view(x_BTD.shape)

    def run_experts(self, routed: RoutedRows) -> Tensor:
        """Return the outputs of the local experts on the received rows."""
        experts, dtype = self.experts, self._precision.dtype
        added = experts.added_up, experts.added_down
        w13_E2FD, keep_up = open_weight(experts.packed_up, experts.w13, dtype)
        w2_EDF, keep_down = open_weight(experts.packed_down, experts.w2, dtype)
        with keep_up, keep_down:
            return self._precision.expert_ffn(routed.rows_RD, routed.gates_R, w13_E2FD, w2_EDF, routed.counts_E, added)
