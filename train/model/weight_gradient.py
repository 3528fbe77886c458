"""Accumulates the gradient of a matmul's weight: one function for all matmuls, precisions and devices.

The `.grad` of a weight is a sum over micro-batches in fp32, even if the weight is bf16 (paper 3.3.3). Here the matmul
adds directly to this sum, without rounding.

The matmul then returns an undefined gradient to autograd. autograd still runs the weight's graph node after all
Functions that use the weight. When this node runs, the gradient is complete (parallel/zero/sharded_weights.py).

Shapes: N rows (any leading axes flattened), I inputs and O outputs of a matmul, R rows sorted by expert, E experts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from train.model.needed import Function, gradients_needed, node_of, once_differentiable, will_accumulate
from train.model.operations import ExpertGroups, Kernels

WeightMatmul = Callable[[torch.dtype, Tensor | None], Tensor]
"""A function (dtype, sum) that returns the gradient in `dtype`, or adds it to an fp32 sum."""


def weight_gradient(ctx: Any, argument: int, weight: Tensor, matmul: WeightMatmul) -> Tensor | None:
    """Compute a weight's gradient, and return what a Function's backward must return for the weight.

    If the gradient is fp32 and this pass accumulates it, the matmul adds it to `.grad`, and the result is None.
    Otherwise the result is the gradient.
    """
    node = node_of(ctx, argument)
    leaf = getattr(node, "variable", None)
    if leaf is None:
        return matmul(weight.dtype, None)
    dtype = leaf.grad_dtype or weight.dtype
    if dtype != torch.float32 or not will_accumulate(node):
        return matmul(dtype, None)
    if leaf.grad is None:
        leaf.grad = matmul(dtype, None)
    else:
        matmul(dtype, leaf.grad)
    return None


class LinearMatmul(Function):
    """Computes `F.linear` without bias with the matmuls of `kernels`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight_OI: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight_OI)  # a frozen weight does not need x
        ctx.kernels = kernels
        return kernels.matmul(_rows(x), weight_OI, x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        (x, weight_OI), kernels = ctx.saved_tensors, ctx.kernels
        x_needed, weight_needed, *_ = gradients_needed(ctx)
        dy_NO, dx, dweight_OI = _rows(dy), None, None
        if x_needed:
            dx = kernels.matmul(dy_NO, weight_OI.t(), dy.dtype).view(*dy.shape[:-1], -1)
        if weight_needed:
            dweight_OI = weight_gradient(ctx, 1, weight_OI, partial(kernels.matmul, dy_NO.t(), _rows(x).t()))
        return dx, dweight_OI, None


class GroupedMatmul(Function):
    """Multiplies each row by the transposed weight of the row's expert.

    It saves the weight itself, which ZeRO 3 can free between forward and backward. F.grouped_mm would save a view,
    which keeps the memory allocated.
    """

    @staticmethod
    def forward(ctx, x_RI: Tensor, weight_EOI: Tensor, groups: ExpertGroups, kernels: Kernels):
        ctx.save_for_backward(x_RI if ctx.needs_input_grad[1] else None, weight_EOI)
        ctx.groups, ctx.kernels = groups, kernels
        return kernels.grouped_matmul(x_RI, weight_EOI.transpose(1, 2), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RO):
        x_RI, weight_EOI = ctx.saved_tensors
        x_needed, weight_needed, *_ = gradients_needed(ctx)
        dx_RI = ctx.kernels.grouped_matmul(grad_RO, weight_EOI, ctx.groups) if x_needed else None
        dweight_EOI = None
        if weight_needed:
            matmul = partial(ctx.kernels.grouped_weight_gradient, grad_RO, x_RI, ctx.groups)
            dweight_EOI = weight_gradient(ctx, 1, weight_EOI, matmul)
        return dx_RI, dweight_EOI, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.size(-1))
