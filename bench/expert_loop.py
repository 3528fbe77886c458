"""SwiGLU experts as a loop over experts with a hand-written backward: a CPU form of the grouped GEMM.

F.grouped_mm writes the inner activations of all experts before SwiGLU reads them. Here each expert's rows go through
GEMM, SwiGLU and GEMM while they are in the cache. The temporaries of one expert are reused for the next, which also
avoids page faults of large tensors. SwiGLU computes in fp32, as in train/model/layers.py.

Shapes: R rows sorted by expert, D width, F inner width, E experts; r and e are the rows and index of one expert.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def expert_loop(rows_RD: Tensor, gates_R: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """Returns w2(silu(w1 x) * w3 x * gate) for every row x and its expert, (R, D) in the rows' dtype."""
    return _ExpertLoop.apply(rows_RD, gates_R, w13_E2FD, w2_EDF, counts_E.tolist())


class _ExpertLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD: Tensor, gates_R: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, counts: list[int]) -> Tensor:
        h_R2F = rows_RD.new_empty(rows_RD.shape[0], w13_E2FD.shape[1])
        y_RD = torch.empty_like(rows_RD)
        parts = zip(*(t.split(counts) for t in (rows_RD, gates_R, h_R2F, y_RD)), w13_E2FD, w2_EDF, strict=True)
        for rows_rD, gates_r, h_r2F, y_rD, w13_2FD, w2_DF in parts:
            torch.mm(rows_rD, w13_2FD.t(), out=h_r2F)
            gate_rF, up_rF = h_r2F.float().chunk(2, 1)
            a_rF = F.silu(gate_rF).mul_(up_rF).mul_(gates_r[:, None])
            torch.mm(a_rF.to(rows_rD.dtype), w2_DF.t(), out=y_rD)
        ctx.save_for_backward(rows_RD, gates_R, w13_E2FD, w2_EDF, h_R2F)
        ctx.counts = counts
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_RD: Tensor):
        rows_RD, gates_R, w13_E2FD, w2_EDF, h_R2F = ctx.saved_tensors
        drows_RD, dgates_R = torch.empty_like(rows_RD), torch.empty_like(gates_R)
        dw13_E2FD, dw2_EDF = torch.empty_like(w13_E2FD), torch.empty_like(w2_EDF)
        by_row = (rows_RD, gates_R, h_R2F, dy_RD.contiguous(), drows_RD, dgates_R)
        parts = zip(*(t.split(ctx.counts) for t in by_row), w13_E2FD, w2_EDF, dw13_E2FD, dw2_EDF, strict=True)
        for rows_rD, gates_r, h_r2F, dy_rD, drows_rD, dgates_r, w13_2FD, w2_DF, dw13_2FD, dw2_DF in parts:
            gate_rF, up_rF = h_r2F.float().chunk(2, 1)
            silu_rF = F.silu(gate_rF)
            da_rF = torch.mm(dy_rD, w2_DF).float()
            a_rF = silu_rF * up_rF
            torch.sum(a_rF * da_rF, 1, out=dgates_r)
            torch.mm(dy_rD.t(), a_rF.mul_(gates_r[:, None]).to(dy_rD.dtype), out=dw2_DF)
            dh_r2F, dproduct_rF = torch.empty_like(h_r2F), da_rF.mul_(gates_r[:, None])
            dgate_rF, dup_rF = dh_r2F.chunk(2, 1)
            dup_rF.copy_(silu_rF.mul_(dproduct_rF))
            dgate_rF.copy_(torch.ops.aten.silu_backward(dproduct_rF.mul_(up_rF), gate_rF))
            torch.mm(dh_r2F, w13_2FD, out=drows_rD)
            torch.mm(dh_r2F.t(), rows_rD, out=dw13_2FD)
        return drows_RD, dgates_R, dw13_E2FD, dw2_EDF, None
