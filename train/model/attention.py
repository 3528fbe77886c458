"""The attention core, softmax(scale q k^T) v, of queries that see some of the keys: the one place that says what it takes and returns.

`AttentionCore` is that in torch's operations on any device, the reference of all others: compiled code for bf16 on a CPU
(train/kernels/cpu/compiled_attention.py), and torch's kernels on a GPU (train/kernels/gpu/fused_attention.py). Who sees whom comes as
rectangles (train/model/sequence.py): whole sequences and packed documents are squares with a diagonal, and what ranks that
share sequences ask of one another is any. Nothing above a diagonal or between documents is computed, or kept as a mask.

Here a block of queries meets all keys that it sees in one product, so memory stays linear in the sequence. All is in fp32.
Backward computes the probabilities again from the log-sum-exp of the scores, l, which may be that over more keys than these:

    p = exp(scale q k^T - l),  dv = p^T do,  ds = scale p * (do v^T - rowsum(do * o)),  dq = ds k,  dk = ds^T q

Shapes: B sequences, H heads, T queries, S keys, Q qk width, V value width, X = B*H rows of a batched product, C queries of a
block.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from conf.thresholds import THRESHOLDS
from train.model.sequence import Seen


class AttentionInput(NamedTuple):
    """What attention takes."""

    q_BHTQ: Tensor
    k_BHSQ: Tensor
    v_BHSV: Tensor
    scale: float
    seen: Seen


class AttentionOutput(NamedTuple):
    """What attention returns."""

    out_BHTV: Tensor
    """In v's format, positions first in memory, as the output projection takes it. 0 of a query that sees nothing."""
    lse_BHT: Tensor
    """Log-sum-exp of the scaled scores of each query, fp32. -inf of one that sees nothing."""
    largest_BHT: Tensor | None = None
    """The largest scaled score of each query, fp32, where it was asked for."""
    kept: Tensor | None = None
    """What else the core wants in backward."""


class AttentionCore:
    """In torch's operations, on any device."""

    takes_documents = True
    """Whether it is made for pieces of any length."""

    def forward(self, given: AttentionInput, keep: bool = False, largest: bool = False) -> AttentionOutput:
        """keep: whether `kept` shall be there for a backward. largest: whether the largest scores are asked for."""
        q32, k32, v32 = (t.flatten(0, 1).float() for t in given[:3])
        out = v32.new_zeros(*q32.shape[:2], v32.size(-1))
        lse, most = (q32.new_full(q32.shape[:2], -torch.inf) for _ in range(2))
        for rows, queries, keys, bias_CS in _blocks(given):
            scores_XCS = torch.baddbmm(bias_CS, q32[rows, queries], k32[rows, keys].mT, alpha=given.scale)
            most[rows, queries] = largest_XC = scores_XCS.amax(-1)
            p_XCS = scores_XCS.softmax(-1)
            lse[rows, queries] = largest_XC - p_XCS.amax(-1).log_()
            out[rows, queries] = torch.bmm(p_XCS, v32[rows, keys])
        shape = given.q_BHTQ.shape[:3]
        out_BHTV = positions_first(out.view(*shape, -1), given.v_BHSV.dtype)
        return AttentionOutput(out_BHTV, lse.view(shape), most.view(shape) if largest else None)

    def backward(
        self, dout_BHTV: Tensor, given: AttentionInput, made: AttentionOutput
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v. made: by `forward`, or output and log-sum-exp over all keys that the queries see, these among them."""
        dout32, q32, k32, v32 = (t.flatten(0, 1).float() for t in (dout_BHTV, *given[:3]))
        mean = -torch.linalg.vecdot(dout32, made.out_BHTV.flatten(0, 1).float()).unsqueeze(-1)
        lse = made.lse_BHT.flatten(0, 1).unsqueeze(-1)
        dq, dk, dv = (torch.zeros_like(t) for t in (q32, k32, v32))
        for rows, queries, keys, bias_CS in _blocks(given):
            q, k, dout = q32[rows, queries], k32[rows, keys], dout32[rows, queries]
            p_XCS = (bias_CS - lse[rows, queries]).baddbmm_(q, k.mT, alpha=given.scale).exp_()
            dv[rows, keys].baddbmm_(p_XCS.mT, dout)
            dscores_XCS = torch.baddbmm(mean[rows, queries], dout, v32[rows, keys].mT).mul_(p_XCS)
            dq[rows, queries].baddbmm_(dscores_XCS, k, alpha=given.scale)
            dk[rows, keys].baddbmm_(dscores_XCS.mT, q, alpha=given.scale)
        return tuple(grad.to(of.dtype).view(of.shape) for grad, of in zip((dq, dk, dv), given[:3], strict=True))


def positions_first(x_BHTV: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in that format, and as `AttentionOutput.out_BHTV` lies in memory."""
    B, H, T, V = x_BHTV.shape
    return x_BHTV.new_empty(B, T, H, V, dtype=dtype).transpose(1, 2).copy_(x_BHTV)


def _blocks(given: AttentionInput) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Rows of the batched products, positions of the queries, those of the keys that any of them sees, and what is added to scores:
    -inf where a query does not see a key, else 0, (C, S).
    """
    batch, heads = given.q_BHTQ.shape[:2]
    length = given.k_BHSQ.size(2)
    most = THRESHOLDS.attention_queries
    bias = torch.full((most, most), -torch.inf, device=given.q_BHTQ.device).triu_(1)
    bias = F.pad(bias, (length, 0))  # behind the diagonal of the last `most` columns
    for sequence, first_query, last_query, first_key, last_key, before in given.seen.rectangles:
        rows = range(batch * heads) if sequence is None else range(sequence * heads, (sequence + 1) * heads)
        block = most if last_query - first_query >= 4 * most else most // 2
        for first in range(first_query, last_query, block):
            last = min(first + block, last_query)
            diagonal = before + first - first_query
            keys = slice(first_key, min(last_key, first_key + diagonal + last - first))
            start = max(length - diagonal, 0)
            bias_CS = bias[: last - first, start : start + keys.stop - first_key]
            count = max(1, THRESHOLDS.attention_scores // bias_CS.numel()) if given.q_BHTQ.is_cpu else len(rows)
            for row in range(rows.start, rows.stop, count):
                yield slice(row, min(row + count, rows.stop)), slice(first, last), keys, bias_CS


class Attend(torch.autograd.Function):
    """`AttentionInput` to the output, with a core."""

    @staticmethod
    def forward(ctx, core: AttentionCore, *given):
        given = AttentionInput(*given)
        made = core.forward(given, keep=any(ctx.needs_input_grad))
        ctx.save_for_backward(*given[:3], made.out_BHTV, made.lse_BHT, made.kept)
        ctx.core, ctx.rest = core, given[3:]
        return made.out_BHTV

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_BHTV):
        q_BHTQ, k_BHTQ, v_BHTV, out_BHTV, lse_BHT, kept = ctx.saved_tensors
        given = AttentionInput(q_BHTQ, k_BHTQ, v_BHTV, *ctx.rest)
        return None, *ctx.core.backward(dout_BHTV, given, AttentionOutput(out_BHTV, lse_BHT, kept=kept)), None, None
