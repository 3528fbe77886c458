"""Computes the router's expert choice on a GPU with train/kernels/gpu/triton_route.py.

Shapes as in train/kernels/plain/routing.py.
"""

import torch
from torch import Tensor

from train.kernels.gpu.fused_rows import runs
from train.model.needed import Function, once_differentiable
from train.model.operations import RoutingRule
from train.model.recompute import is_repeated, recall, remember
from train.model.sequence import Positions


class FusedRoute(Function):
    """Implements `train.model.operations.Kernels.route`."""

    @staticmethod
    def forward(
        ctx, logits_BTE, bias_E, rule: RoutingRule, balance_weight: float, counters, positions: Positions, replayed_BTK
    ):
        logits_BTE = logits_BTE.contiguous()
        known_BTK = recall() if replayed_BTK is None else replayed_BTK.contiguous()
        B, T, E = logits_BTE.shape
        ids_BTK = logits_BTE.new_empty(B, T, rule.top_k, dtype=torch.int64) if known_BTK is None else known_BTK
        gates_BTK = logits_BTE.new_empty(B, T, rule.top_k)
        factor_BT1, total_BT1 = logits_BTE.new_empty(2, B, T, 1)
        frequency_BE, scores_BTE = logits_BTE.new_empty(B, E), torch.empty_like(logits_BTE)
        weight = balance_weight if counters is not None else 0.0
        if runs(logits_BTE):
            kernels, sums = _triton(), None
            if counters is not None:
                blocks, dtypes = -(-T // kernels.ROUTE_TOKENS), (torch.int32, torch.float32, torch.int32)
                count, score, balance = (logits_BTE.new_empty(B, blocks, E, dtype=dtype) for dtype in dtypes)
                sums = count, score, balance
            made = scores_BTE, ids_BTK, gates_BTK, factor_BT1, total_BT1
            kernels.route(logits_BTE, bias_E, rule, made, sums, known_BTK is not None, bool(weight))
            if sums is not None:
                kernels.finish_route(sums, counters, frequency_BE, rule, T, weight, not is_repeated())
        if known_BTK is None:
            remember(ids_BTK)
        ctx.save_for_backward(scores_BTE, ids_BTK, gates_BTK, factor_BT1, total_BT1, frequency_BE)
        ctx.rule, ctx.weight = rule, weight
        ctx.mark_non_differentiable(ids_BTK)
        ctx.set_materialize_grads(False)  # so that autograd builds no zero gradient for the ids
        return gates_BTK, ids_BTK

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTK: Tensor, _):
        scores_BTE = ctx.saved_tensors[0]
        dlogits_BTE = torch.empty_like(scores_BTE)
        if runs(dlogits_BTE):
            _triton().route_backward(grad_BTK.contiguous(), ctx.saved_tensors, dlogits_BTE, ctx.rule, ctx.weight)
        return dlogits_BTE, None, None, None, None, None, None


def _triton():
    """Imports and returns the module with the Triton kernels."""
    from train.kernels.gpu import triton_route

    return triton_route
