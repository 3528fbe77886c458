"""Computes SwiGLU and the split into heads on a GPU with the kernels of train/kernels/gpu/triton_rows.py.

Only the first call imports Triton, because mode=plan also runs without it. On the meta device, the functions create the
same tensors as in a run, so mode=plan can count their memory. Shapes as in train/model/operations.py.
"""

import torch
from torch import Tensor

from train.model.needed import Function, once_differentiable


def swiglu(h_N2F: Tensor, gates_N: Tensor | None) -> Tensor:
    """Returns silu(gate) * up, (N, F), times each row's gate value if given."""
    out_NF = h_N2F.new_empty(h_N2F.size(0), h_N2F.size(1) // 2)
    if runs(out_NF):
        _triton().swiglu(h_N2F.contiguous(), None if gates_N is None else gates_N.contiguous(), out_NF)
    return out_NF


def swiglu_backward(grad_NF: Tensor, h_N2F: Tensor, gates_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients of h and of the gate values."""
    grad_NF, h_N2F = grad_NF.contiguous(), h_N2F.contiguous()
    dh_N2F = torch.empty_like(h_N2F)
    dgates_N = None if gates_N is None else gates_N.new_empty(gates_N.shape)
    if runs(dh_N2F):
        _triton().swiglu_backward(grad_NF, h_N2F, None if gates_N is None else gates_N.contiguous(), dh_N2F, dgates_N)
    return dh_N2F, dgates_N


class FusedHeads(Function):
    """Implements `train.model.operations.Kernels.to_heads`. Returned queries and values are views of the inputs."""

    @staticmethod
    def forward(ctx, q_BTHQ: Tensor, kv_BTHX: Tensor, k_rope_BTR: Tensor, table: Tensor, nope: int):
        ctx.table = table
        return heads(q_BTHQ, kv_BTHX, k_rope_BTR, table, nope)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_BHTQ: Tensor, dk_BHTQ: Tensor, dv_BHTV: Tensor):
        return *heads_backward(dq_BHTQ, dk_BHTQ, dv_BHTV, ctx.table), None, None


def heads(
    q_BTHQ: Tensor, kv_BTHX: Tensor, k_rope_BTR: Tensor, table: Tensor, nope: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns queries (rotated in place), keys, and values (a view of kv_BTHX), with heads before positions."""
    B, T = q_BTHQ.shape[:2]
    q_BTHQ, kv_BTHX = q_BTHQ.contiguous(), kv_BTHX.contiguous()
    k_BTHQ = torch.empty_like(q_BTHQ)
    if k_rope_BTR.stride(2) != 1 or (B > 1 and k_rope_BTR.stride(0) != T * k_rope_BTR.stride(1)):
        k_rope_BTR = k_rope_BTR.contiguous()
    if runs(k_BTHQ):
        _triton().heads(q_BTHQ[..., nope:], kv_BTHX[..., :nope], k_rope_BTR, _reals(table), k_BTHQ)
    return q_BTHQ.transpose(1, 2), k_BTHQ.transpose(1, 2), kv_BTHX[..., nope:].transpose(1, 2)


def heads_backward(dq_BHTQ: Tensor, dk_BHTQ: Tensor, dv_BHTV: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, kv and the rope key, from gradients in any memory order."""
    B, H, T, Q = dq_BHTQ.shape
    rope = 2 * table.size(1)
    dq_BTHQ, dkv_BTHX = (dq_BHTQ.new_empty(B, T, H, width) for width in (Q, Q - rope + dv_BHTV.size(3)))
    dk_rope_BTR = dq_BHTQ.new_empty(B, T, rope)
    if runs(dq_BTHQ):
        dq, dk, dv = (t if t.stride(3) == 1 else t.contiguous() for t in (dq_BHTQ, dk_BHTQ, dv_BHTV))
        _triton().heads_backward(dq, dk, dv, _reals(table), dq_BTHQ, dkv_BTHX, dk_rope_BTR)
    return dq_BTHQ, dkv_BTHX, dk_rope_BTR


def runs(out: Tensor) -> bool:
    """Returns whether a kernel must run: the output is neither empty nor meta."""
    return out.numel() > 0 and not out.is_meta


def _reals(table: Tensor) -> Tensor:
    """Returns complex rotation factors (T, R/2) as real numbers (T, R/2, 2)."""
    return torch.view_as_real(table.contiguous())


def _triton():
    """Imports and returns the module with the Triton kernels."""
    from train.kernels.gpu import triton_rows

    return triton_rows
