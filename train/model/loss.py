"""Computes the cross-entropy, and log-probabilities for other losses, chunk by chunk (model.loss_chunk).

The logits of all tokens never exist at the same time. For each chunk, forward computes the logits, the softmax in fp32,
the loss, and the gradients of the hidden states and the head. Backward only scales these gradients. A CPU processes a
few rows at a time, which fit in the cache.

Shapes: N tokens, C tokens of a chunk, R rows of a chunk, D width, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from train.model.needed import Function, gradients_needed, is_recorded, once_differentiable
from train.model.operations import Kernels
from train.model.weight_gradient import weight_gradient


def cross_entropy(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, divisor: float, chunk: int, kernels: Kernels
) -> Tensor:
    """Return the sum of -log softmax(hidden head^T)[target] over tokens, divided by divisor; fp32 scalar."""
    return _CrossEntropy.apply(hidden_ND, head_VD, targets_N, divisor, chunk, kernels)


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx, hidden_ND, head_VD, targets_N, divisor: float, chunk: int, kernels: Kernels):
        head = head_VD.to(hidden_ND.dtype)
        want_hidden, want_head = (needed and is_recorded(ctx) for needed in ctx.needs_input_grad[:2])
        scale = 1 / divisor if want_hidden or want_head else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        dhidden, dhead_VD = [], None
        for hidden_CD, targets_C in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True):
            logits_CV = kernels.matmul(hidden_CD, head, head.dtype)
            loss += kernels.cross_entropy(logits_CV, targets_C, scale)
            dlogits_CV = logits_CV  # `cross_entropy` has replaced the logits by their gradient
            if want_hidden:
                dhidden.append(kernels.matmul(dlogits_CV, head.t(), head.dtype))
            if want_head:
                dhead_VD = kernels.matmul(dlogits_CV.t(), hidden_CD.t(), torch.float32, dhead_VD)
        ctx.save_for_backward(torch.cat(dhidden) if want_hidden else None, dhead_VD)
        return loss / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        dhidden_ND, kept_VD = ctx.saved_tensors
        hidden_needed, head_needed, *_ = gradients_needed(ctx)
        dhidden_ND = dhidden_ND * grad.to(dhidden_ND.dtype) if hidden_needed else None
        dhead_VD = None
        if head_needed:

            def scaled(dtype: torch.dtype, into_VD: Tensor | None) -> Tensor:
                return kept_VD * grad if into_VD is None else into_VD.addcmul_(kept_VD, grad)

            dhead_VD = weight_gradient(ctx, 1, kept_VD, scaled)
        return dhidden_ND, dhead_VD, None, None, None, None


def token_logprobs(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, temperature_N: Tensor | None, chunk: int, kernels: Kernels
) -> Tensor:
    """Return log softmax(hidden head^T / temperature)[target] of every token, fp32 (N,). temperature_N: None for 1.

    Only one chunk's logits exist at a time, in fp32. Backward computes them again.
    """
    return _TokenLogprobs.apply(hidden_ND, head_VD, targets_N, temperature_N, chunk, kernels)


class _TokenLogprobs(Function):
    @staticmethod
    def forward(ctx, hidden_ND, head_VD, targets_N, temperature_N, chunk: int, kernels: Kernels):
        ctx.save_for_backward(hidden_ND, head_VD, targets_N, temperature_N)
        ctx.chunk, ctx.kernels = chunk, kernels
        parts = _log_softmax_of_chunks(hidden_ND, head_VD, temperature_N, chunk, kernels)
        return torch.cat([parts_CV.gather(1, targets_N[rows].unsqueeze(1)) for rows, parts_CV in parts]).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N: Tensor):
        hidden_ND, head_VD, targets_N, temperature_N = ctx.saved_tensors
        hidden_needed, head_needed, *_ = gradients_needed(ctx)
        kernels, head, dhidden, dhead_VD = ctx.kernels, head_VD.to(hidden_ND.dtype), [], None
        grad_N1 = (grad_N if temperature_N is None else grad_N / temperature_N).unsqueeze(1)
        for rows, log_p_CV in _log_softmax_of_chunks(hidden_ND, head_VD, temperature_N, ctx.chunk, kernels):
            # d log p[target] / d logit_v = (1 if v = target, else 0) - p_v
            dlogits_CV = log_p_CV.exp_().mul_(-grad_N1[rows])
            dlogits_CV.scatter_add_(1, targets_N[rows].unsqueeze(1), grad_N1[rows])
            dlogits_CV = dlogits_CV.to(head.dtype)
            if hidden_needed:
                dhidden.append(kernels.matmul(dlogits_CV, head.t(), head.dtype))
            if head_needed:
                dhead_VD = kernels.matmul(dlogits_CV.t(), hidden_ND[rows].t(), torch.float32, dhead_VD)
        dweight_VD, kept_VD = None, dhead_VD
        if kept_VD is not None:

            def summed(dtype: torch.dtype, into_VD: Tensor | None) -> Tensor:
                return kept_VD if into_VD is None else into_VD.add_(kept_VD)

            dweight_VD = weight_gradient(ctx, 1, head_VD, summed)
        return torch.cat(dhidden) if hidden_needed else None, dweight_VD, None, None, None, None


def _log_softmax_of_chunks(
    hidden_ND: Tensor, head_VD: Tensor, temperature_N: Tensor | None, chunk: int, kernels: Kernels
) -> Iterator[tuple[slice, Tensor]]:
    """Yield each chunk's slice and its log softmax(logits / temperature), fp32 (C, V)."""
    head = head_VD.to(hidden_ND.dtype)
    for first in range(0, len(hidden_ND), chunk):
        rows = slice(first, first + chunk)
        logits_CV = kernels.matmul(hidden_ND[rows], head, torch.float32)
        if temperature_N is not None:
            logits_CV = logits_CV / temperature_N[rows].unsqueeze(1)
        yield rows, logits_CV.log_softmax(-1)
