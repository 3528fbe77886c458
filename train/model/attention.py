"""The attention core: causal softmax(scale q k^T) v, whole sequences or inside packed documents.

A GPU uses torch's kernels; a run says which (train/attention_choice.py). On the CPU torch's flash kernel wants values as wide as keys and keeps its products small;
here a block of queries meets all earlier keys in one product, so memory stays linear in the sequence and work above the
diagonal is skipped. Scores and softmax are in fp32; backward computes them again from q and k, so nothing else is kept.
The same is there as compiled code for bf16 (train/model/compiled_attention.py), to which this is the reference; that keeps
the probabilities of short spans.

Shapes: B sequences, H heads, T positions, Q qk width, V value width, X = B*H rows of a batched product, C queries of a
block, S keys up to its end.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from train.model.sequence import Rectangle

BLOCK = 128
"""Queries of a block on the CPU; half of it in spans below four blocks, where more would lie above the diagonal."""
SCORES = 1 << 20
"""Scores of a block at a time on the CPU, in fp32 4 MiB: as many heads as that takes, so that they stay in the cache."""


Attention = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]
"""From q, k (B, H, T, Q), v (B, H, T, V), the scale and the documents, see `train.model.kernels.Kernels.attention`."""


def document_mask(documents_BT: Tensor) -> Tensor:
    """Which earlier positions of its own document each position sees: bool (B, 1, T, T)."""
    same_BTT = documents_BT.unsqueeze(-1) == documents_BT.unsqueeze(-2)
    return same_BTT.tril_().unsqueeze(1)


def document_spans(documents_BT: Tensor | None) -> list[tuple[int, int, int]] | None:
    """(sequence, start, end) of every document; None for whole sequences."""
    if documents_BT is None:
        return None
    spans = []
    for row, documents_T in enumerate(documents_BT):
        ends = torch.unique_consecutive(documents_T, return_counts=True)[1].cumsum(0).tolist()
        spans += [(row, start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return spans


def _blocks(spans: list[tuple[int, int, int]] | None, batch: int, heads: int, length: int) -> Iterator[tuple]:
    """Rows of the batched products, positions of the queries, and positions of their keys, as slices."""
    whole = [(range(batch * heads), 0, length)]
    for rows, start, end in (
        whole if spans is None else [(range(b * heads, (b + 1) * heads), s, e) for b, s, e in spans]
    ):
        block = BLOCK if end - start >= 4 * BLOCK else BLOCK // 2
        for first in range(start, end, block):
            last = min(first + block, end)
            count = max(1, SCORES // ((last - first) * (last - start)))
            for row in range(rows.start, rows.stop, count):
                yield slice(row, min(row + count, rows.stop)), slice(first, last), slice(start, last)


def _causal_bias(length: int, device: torch.device) -> Tensor:
    """-inf above the diagonal of the last BLOCK columns, else 0: fp32 (BLOCK, BLOCK + length)."""
    bias = torch.full((BLOCK, BLOCK), -torch.inf, device=device).triu_(1)
    return F.pad(bias, (length, 0))


def _probabilities(q_XCQ: Tensor, k_XSQ: Tensor, bias: Tensor, scale: float) -> Tensor:
    """(X, C, S) of fp32 queries that are the last C of the S positions."""
    queries, keys = q_XCQ.size(1), k_XSQ.size(1)
    first = bias.size(1) - BLOCK + queries - keys
    bias_CS = bias[:queries, first : first + keys]
    return torch.baddbmm(bias_CS, q_XCQ, k_XSQ.transpose(1, 2), alpha=scale).softmax(-1)


def _add_product(sum_32: Tensor, a: Tensor, b: Tensor) -> None:
    """sum += a b, inside the product where the formats agree."""
    if a.dtype == sum_32.dtype:
        sum_32.baddbmm_(a, b)
    else:
        sum_32 += torch.bmm(a, b)


def _rectangle_blocks(rectangles: Sequence[Rectangle], batch: int, heads: int) -> Iterator[tuple]:
    """Rows of the batched products, positions of the queries, those of the keys that any of them sees, and what is added to scores."""
    for sequence, first_query, last_query, first_key, last_key, before in rectangles:
        rows = range(batch * heads) if sequence is None else range(sequence * heads, (sequence + 1) * heads)
        for first in range(first_query, last_query, BLOCK):
            last = min(first + BLOCK, last_query)
            seen = min(last_key, first_key + before + last - first_query)
            count = max(1, SCORES // ((last - first) * (seen - first_key)))
            diagonal = before + first - first_query
            for row in range(rows.start, rows.stop, count):
                yield slice(row, min(row + count, rows.stop)), slice(first, last), slice(first_key, seen), diagonal


def _scores(q_XCQ: Tensor, k_XSQ: Tensor, scale: float, diagonal: int) -> Tensor:
    """(X, C, S) in fp32; -inf behind the diagonal, which lies so many keys to the right."""
    scores_XCS = torch.bmm(q_XCQ, k_XSQ.transpose(1, 2)).mul_(scale)
    if diagonal >= k_XSQ.size(1) - 1:
        return scores_XCS
    unseen_CS = torch.ones(scores_XCS.shape[1:], dtype=torch.bool, device=scores_XCS.device).triu_(diagonal + 1)
    return scores_XCS.masked_fill_(unseen_CS, -torch.inf)


def attend(
    q_BHTQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor, scale: float, rectangles: Sequence[Rectangle]
) -> tuple[Tensor, Tensor]:
    """`train.model.kernels.Kernels.attend` in torch's operations."""
    q32, k32, v32 = (t.flatten(0, 1).float() for t in (q_BHTQ, k_BHSQ, v_BHSV))
    out = torch.zeros(*q32.shape[:2], v32.size(-1), dtype=torch.float32, device=q32.device)
    lse = torch.full(q32.shape[:2], -torch.inf, dtype=torch.float32, device=q32.device)
    for rows, queries, keys, diagonal in _rectangle_blocks(rectangles, *q_BHTQ.shape[:2]):
        scores_XCS = _scores(q32[rows, queries], k32[rows, keys], scale, diagonal)
        lse_XC = scores_XCS.logsumexp(-1)
        out[rows, queries] = torch.bmm(scores_XCS.sub_(lse_XC.unsqueeze(-1)).exp_(), v32[rows, keys])
        lse[rows, queries] = lse_XC
    return out.view(*q_BHTQ.shape[:3], -1), lse.view(q_BHTQ.shape[:3])


def attend_backward(
    dout_BHTV: Tensor,
    q_BHTQ: Tensor,
    k_BHSQ: Tensor,
    v_BHSV: Tensor,
    out_BHTV: Tensor,
    lse_BHT: Tensor,
    scale: float,
    rectangles: Sequence[Rectangle],
) -> tuple[Tensor, Tensor, Tensor]:
    """`train.model.kernels.Kernels.attend_backward` in torch's operations."""
    dout32, q32, k32, v32 = (t.flatten(0, 1).float() for t in (dout_BHTV, q_BHTQ, k_BHSQ, v_BHSV))
    delta = torch.linalg.vecdot(dout32, out_BHTV.flatten(0, 1).float()).unsqueeze(-1)
    lse = lse_BHT.flatten(0, 1).unsqueeze(-1)
    dq, dk, dv = torch.zeros_like(q32), torch.zeros_like(k32), torch.zeros_like(v32)
    for rows, queries, keys, diagonal in _rectangle_blocks(rectangles, *q_BHTQ.shape[:2]):
        p_XCS = _scores(q32[rows, queries], k32[rows, keys], scale, diagonal).sub_(lse[rows, queries]).exp_()
        dout = dout32[rows, queries]
        dv[rows, keys] += torch.bmm(p_XCS.transpose(1, 2), dout)
        dscores_XCS = (
            torch.bmm(dout, v32[rows, keys].transpose(1, 2)).sub_(delta[rows, queries]).mul_(p_XCS).mul_(scale)
        )
        dq[rows, queries] += torch.bmm(dscores_XCS, k32[rows, keys])
        dk[rows, keys] += torch.bmm(dscores_XCS.transpose(1, 2), q32[rows, queries])
    grads = ((dq, q_BHTQ), (dk, k_BHSQ), (dv, v_BHSV))
    return tuple(grad.to(of.dtype).view(of.shape) for grad, of in grads)


class BlockAttention(torch.autograd.Function):
    """In torch's operations. spans: (sequence, start, end) of every document."""

    @staticmethod
    def forward(ctx, q_BHTQ, k_BHTQ, v_BHTV, scale: float, spans):
        ctx.save_for_backward(q_BHTQ, k_BHTQ, v_BHTV)
        ctx.scale, ctx.spans = scale, spans
        q, k, v = (t.flatten(0, 1) for t in (q_BHTQ, k_BHTQ, v_BHTV))
        q32, k32 = q.float(), k.float()
        out = torch.empty_like(v)
        bias = _causal_bias(q.size(1), q.device)
        for rows, queries, keys in _blocks(spans, *q_BHTQ.shape[:3]):
            p_XCS = _probabilities(q32[rows, queries], k32[rows, keys], bias, scale)
            out[rows, queries] = torch.bmm(p_XCS.to(v.dtype), v[rows, keys])
        return out.view(v_BHTV.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_BHTV):
        q, k, v = (t.flatten(0, 1) for t in ctx.saved_tensors)
        q32, k32, dout = q.float(), k.float(), dout_BHTV.flatten(0, 1)
        dq, dk, dv = (
            torch.empty_like(q),
            torch.zeros_like(k, dtype=torch.float32),
            torch.zeros_like(v, dtype=torch.float32),
        )
        bias = _causal_bias(q.size(1), q.device)
        for rows, queries, keys in _blocks(ctx.spans, *dout_BHTV.shape[:3]):
            p_XCS = _probabilities(q32[rows, queries], k32[rows, keys], bias, ctx.scale).to(v.dtype)
            _add_product(dv[rows, keys], p_XCS.transpose(1, 2), dout[rows, queries])
            dp_XCS = torch.bmm(dout[rows, queries], v[rows, keys].transpose(1, 2))
            dscores_XCS = torch.ops.aten._softmax_backward_data(dp_XCS, p_XCS, -1, p_XCS.dtype).mul_(ctx.scale)
            dq[rows, queries] = torch.bmm(dscores_XCS, k[rows, keys])
            _add_product(dk[rows, keys], dscores_XCS.transpose(1, 2), q[rows, queries])
        shapes = (t.shape for t in ctx.saved_tensors)
        grads = (g.to(q.dtype).view(shape) for g, shape in zip((dq, dk, dv), shapes, strict=True))
        return *grads, None, None
