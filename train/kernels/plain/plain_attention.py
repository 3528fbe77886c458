"""The attention core in torch's operations on any device, the reference of all others (train/model/attention.py has the formulas).

A block of queries meets all keys that it sees in one product, so memory stays linear in the sequence. All is in fp32.

Shapes as in train/model/attention.py; X = B*H rows of a batched product, C queries of a block.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.thresholds import THRESHOLDS
from train.model.attention import AttentionCore, AttentionInput, AttentionOutput, positions_first


class PlainAttention(AttentionCore):
    """`AttentionCore` in torch's operations, on any device."""

    takes_documents = True

    def forward(self, given: AttentionInput, keep: bool = False, largest: bool = False) -> AttentionOutput:
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
        dq, dk, dv = (grad.to(of.dtype).view(of.shape) for grad, of in zip((dq, dk, dv), given[:3], strict=True))
        return dq, dk, dv


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
