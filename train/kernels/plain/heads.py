"""Splits queries, keys and values into heads in torch, rotates the rope parts, and moves heads before positions.

Shapes: B sequences, T positions, H heads, R rope width, Q qk width, V value width.
"""

import torch

from train.model.needed import Function, once_differentiable
from train.model.rope import rotate


class PlainHeads(Function):
    """Implements `train.model.operations.Kernels.to_heads`."""

    @staticmethod
    def forward(ctx, q_BTHQ, kv_BTHX, k_rope_BTR, table, nope: int):
        batch, length, heads, width = q_BTHQ.shape
        q_out, k_out = (q_BTHQ.new_empty(batch, heads, length, width) for _ in range(2))
        q_out[..., :nope] = q_BTHQ[..., :nope].transpose(1, 2)
        q_out[..., nope:] = rotate(q_BTHQ[..., nope:], table).transpose(1, 2)
        k_out[..., :nope] = kv_BTHX[..., :nope].transpose(1, 2)
        k_out[..., nope:] = rotate(k_rope_BTR.unsqueeze(2), table).transpose(1, 2)
        ctx.table, ctx.nope = table, nope
        return q_out, k_out, kv_BTHX[..., nope:].transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_BHTQ, dk_BHTQ, dv_BHTV):
        nope, back = ctx.nope, ctx.table.conj()
        batch, heads, length, width = dq_BHTQ.shape
        dq_BTHQ = dq_BHTQ.new_empty(batch, length, heads, width)
        dq_BTHQ[..., :nope] = dq_BHTQ[..., :nope].transpose(1, 2)
        dq_BTHQ[..., nope:] = rotate(dq_BHTQ[..., nope:].transpose(1, 2), back)
        dkv_BTHX = torch.cat([dk_BHTQ[..., :nope], dv_BHTV], -1).transpose(1, 2).contiguous()
        shared_BT1R = dk_BHTQ[..., nope:].sum(1, dtype=torch.float32).unsqueeze(2)
        return dq_BTHQ, dkv_BTHX, rotate(shared_BT1R, back).squeeze(2).to(dk_BHTQ.dtype), None, None
