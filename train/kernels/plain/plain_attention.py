"""Attention in torch operations on any device, the reference of all other cores.

train/model/attention.py has the formulas. One matmul processes a block of queries and all keys that they see, so memory
grows linearly with the sequence length. All arithmetic is in fp32.

Shapes as in train/model/attention.py; X = B*H rows of a batched matmul, C queries of a block.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.thresholds import THRESHOLDS
from train.model.attention import AttentionCore, AttentionInput, AttentionOutput, positions_first
from train.model.sequence import SeenKeys


class PlainAttention(AttentionCore):
    """Implements `AttentionCore` in torch operations, on any device."""

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
    """Yields blocks: rows of the batched matmul, positions of queries and of keys, and the mask (C, S).

    A block has every key that one of its queries sees. The mask is added to the scores: -inf for unseen keys, else 0.
    """
    batch, heads = given.q_BHTQ.shape[:2]
    for sequences, queries, keys, bias_CS in query_blocks(given.seen, given.k_BHSQ.size(2), batch, given.q_BHTQ.device):
        rows = range(sequences.start * heads, sequences.stop * heads)
        count = max(1, THRESHOLDS.attention_scores // bias_CS.numel()) if given.q_BHTQ.is_cpu else len(rows)
        for row in range(rows.start, rows.stop, count):
            yield slice(row, min(row + count, rows.stop)), queries, keys, bias_CS


def query_blocks(
    seen: SeenKeys, length: int, batch: int, device: torch.device
) -> Iterator[tuple[range, slice, slice, Tensor]]:
    """Yields blocks of queries: the sequences, the positions of queries and of keys, and the mask (C, S).

    length: number of keys.
    The queries of a block see the same keys up to a causal diagonal. The mask is added to the scores: -inf where a
    query does not see a key, else 0.
    """
    most = THRESHOLDS.attention_queries
    bias = torch.full((most, most), -torch.inf, device=device).triu_(1)
    bias = F.pad(bias, (length, 0))  # a mask of zeros for the keys before the diagonal
    for sequence, first_query, last_query, first_key, last_key, before in seen.rectangles:
        sequences = range(batch) if sequence is None else range(sequence, sequence + 1)
        block = most if last_query - first_query >= 4 * most else most // 2
        for first in range(first_query, last_query, block):
            last = min(first + block, last_query)
            diagonal = before + first - first_query
            keys = slice(first_key, min(last_key, first_key + diagonal + last - first))
            start = max(length - diagonal, 0)
            bias_CS = bias[: last - first, start : start + keys.stop - first_key]
            yield sequences, slice(first, last), keys, bias_CS
