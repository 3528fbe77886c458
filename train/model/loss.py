"""Cross-entropy that never holds the logits of all tokens (model.loss_chunk at a time).

Forward takes a chunk of tokens, computes logits, softmax in fp32, the loss, and at once the gradients of the hidden states
and of the head: they are ready when backward starts, which only scales them. With a vocabulary of 129,280 the logits of
one 4096-token sequence would be 2 GiB in fp32, and their gradient as much again.

Shapes: N tokens, D width, V vocabulary.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from train.model.needed import gradients_needed


def cross_entropy(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, divisor: int, chunk: int) -> Tensor:
    """Sum over tokens of -log softmax(hidden head^T)[target], divided by divisor; fp32 scalar."""
    return _CrossEntropy.apply(hidden_ND, head_VD, targets_N, divisor, chunk)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, head_VD, targets_N, divisor: int, chunk: int):
        head = head_VD.to(hidden_ND.dtype)
        want_hidden, want_head = ctx.needs_input_grad[:2]
        loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        dhidden, dhead_VD = [], None
        for hidden_CD, targets_C in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True):
            targets_C1 = targets_C.unsqueeze(-1)
            log_p_CV = torch.log_softmax(F.linear(hidden_CD, head), -1, dtype=torch.float32)
            loss -= log_p_CV.gather(-1, targets_C1).sum()
            if not (want_hidden or want_head):
                continue
            dlogits_CV = log_p_CV.exp_()
            dlogits_CV.scatter_add_(-1, targets_C1, dlogits_CV.new_full(targets_C1.shape, -1.0))
            dlogits_CV = dlogits_CV.mul_(1 / divisor).to(head.dtype)
            if want_hidden:
                dhidden.append(dlogits_CV @ head)
            if want_head:
                part_VD = (dlogits_CV.t() @ hidden_CD).float()
                dhead_VD = part_VD if dhead_VD is None else dhead_VD.add_(part_VD)
        ctx.save_for_backward(torch.cat(dhidden) if want_hidden else None, dhead_VD)
        return loss / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        dhidden_ND, dhead_VD = ctx.saved_tensors
        hidden_needed, head_needed, *_ = gradients_needed(ctx)
        dhidden_ND = dhidden_ND * grad.to(dhidden_ND.dtype) if hidden_needed else None
        return dhidden_ND, dhead_VD * grad if head_needed else None, None, None, None
