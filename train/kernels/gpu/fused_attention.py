"""The attention cores on a GPU with torch's kernels. train/kernels/choice.py selects the core for a run.

One kernel call can compute several consecutive documents of a sequence. Queries see keys up to the diagonal of their
document, so the call needs no mask. Any other rectangle of queries and keys needs a separate call. Calls with all
sequences have few different lengths; a call with one sequence may have any length. So the fastest core may differ
between the two kinds of calls (`AttentionByKind`).

Shapes as in train/model/attention.py; P documents of a call, M queries of a call.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from train.kernels.plain.plain_attention import PlainAttention
from train.model.attention import AttentionInput, AttentionOutput, positions_first
from train.model.sequence import Rectangle

ATEN = torch.ops.aten
LSE_ROWS = 32
"""The memory-efficient kernel pads log-sum-exps to multiples of this many queries."""
WASTE = 4
"""Largest ratio of allocated log-sum-exps to queries in a call. A kernel call allocates as many log-sum-exps for every
document as for its longest document.
"""


class _Documents(NamedTuple):
    """The documents for which one kernel call computes attention."""

    longest: int
    bounds: Tensor
    """Start of each document, then the end of the last: int32 (P + 1,)."""
    places: tuple[Tensor, Tensor]
    """For each query: the index of its document, and its position in this document. Both int64 (M,)."""


class _Call(NamedTuple):
    """The arguments of one call of an attention kernel.

    causal: whether queries see keys only up to the diagonal of their document.
    documents: the documents of the call, if there are several.
    """

    sequences: slice
    queries: slice
    keys: slice
    causal: bool
    documents: _Documents | None = None

    def take(self, *tensors: Tensor) -> list[Tensor]:
        """Returns this call's elements of q, k, v and further tensors. Further tensors have an axis of queries."""
        return [t[self.sequences, :, self.keys if i in (1, 2) else self.queries] for i, t in enumerate(tensors)]


def calls(rectangles: Sequence[Rectangle], device: torch.device, waste: float = WASTE) -> list[_Call]:
    """Returns the kernel calls for these rectangles of queries and keys. waste: see WASTE."""
    return [_call(run, device) for run in _runs(rectangles, waste)]


def _runs(rectangles: Sequence[Rectangle], waste: float) -> Iterator[list[Rectangle]]:
    """Groups rectangles of queries and keys by kernel call. Only consecutive documents can share a call."""
    run: list[Rectangle] = []
    for one in rectangles:
        if run:
            longest = max(r.last_query - r.first_query for r in (*run, one))
            follows = (one.sequence, one.first_query, one.first_key) == (
                run[0].sequence,
                run[-1].last_query,
                run[-1].last_key,
            )
            room = (len(run) + 1) * longest <= waste * (one.last_query - run[0].first_query)
            if not (follows and room and run[0].before == one.before == 0):
                yield run
                run = []
        run.append(one)
    if run:
        yield run


def _call(run: list[Rectangle], device: torch.device) -> _Call:
    sequence, first, _, first_key, last_key, before = run[0]
    lengths, causal = [one.last_query - one.first_query for one in run], before == 0
    as_is = lengths[0] == last_key - first_key if causal else before >= last_key - first_key - 1
    assert as_is, "keys are a piece of a sequence, as are queries"
    documents = None
    if len(run) > 1:
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        number_M = torch.repeat_interleave(torch.tensor(lengths))
        places = torch.stack([number_M, torch.arange(len(number_M)) - bounds[number_M]])
        number_M, place_M = _sent(places, device).unbind()
        documents = _Documents(max(lengths), _sent(bounds.int(), device), (number_M, place_M))
    sequences = slice(None) if sequence is None else slice(sequence, sequence + 1)
    queries, keys = slice(first, run[-1].last_query), slice(first_key, run[-1].last_key)
    return _Call(sequences, queries, keys, causal, documents)


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """Returns the tensor on the device. The host does not wait."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


class EfficientAttention(PlainAttention):
    """torch's memory-efficient kernel, for every GPU since 2016, also for documents."""

    waste: float = WASTE

    def forward(self, given: AttentionInput, keep: bool = False, largest: bool = False) -> AttentionOutput:
        q, k, v, scale, seen, *_ = given
        found = seen.once(calls, q.device, self.waste)
        parts = [(call, *self._forward(call, *call.take(q, k, v), scale=scale)) for call in found]
        if len(parts) == 1 and parts[0][1].shape[:3] == q.shape[:3]:
            out, lse = parts[0][1:]
            return AttentionOutput(out, lse, _largest(given, lse) if largest else None)
        out = q.new_zeros(q.size(0), q.size(2), q.size(1), v.size(-1)).transpose(1, 2)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
        for call, part, part_lse in parts:
            out[call.sequences, :, call.queries] = part
            lse[call.sequences, :, call.queries] = part_lse
        return AttentionOutput(out, lse, _largest(given, lse) if largest else None)

    def backward(
        self, dout_BHTV: Tensor, given: AttentionInput, made: AttentionOutput
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs, scale, seen = given[:3], given.scale, given.seen
        # The kernel ignores the output's strides, and assumes the order positions, heads, width.
        assert made.out_BHTV.stride(1) == made.out_BHTV.size(3), "the output has its positions first"
        grads: tuple[Tensor, ...] | None = None
        for call in seen.once(calls, dout_BHTV.device, self.waste):
            taken = call.take(*inputs, dout_BHTV, made.out_BHTV, made.lse_BHT)
            parts = self._backward(call, *taken, scale=scale)
            if all(part.shape == of.shape for part, of in zip(parts, inputs, strict=True)):
                return parts
            grads = grads or tuple(torch.zeros_like(of) for of in inputs)
            for grad, part in zip(call.take(*grads), parts, strict=True):
                grad += part
        dq, dk, dv = grads or (torch.zeros_like(of) for of in inputs)
        return dq, dk, dv

    def _forward(self, call: _Call, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Returns the output and the log-sum-exp of one call."""
        if call.documents is None:
            out, lse, *_ = ATEN._scaled_dot_product_efficient_attention(
                q, k, v, None, True, 0.0, call.causal, scale=scale
            )
            return out, lse[..., : q.size(2)]
        longest, bounds, (document_M, place_M) = call.documents
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out, lse_PHL, *_ = ATEN._efficient_attention_forward(
            q, k, v, None, bounds, bounds, longest, longest, 0.0, int(call.causal), True, scale=scale
        )
        return out.transpose(1, 2), lse_PHL[document_M, :, place_M].t().unsqueeze(0)

    def _backward(
        self, call: _Call, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns one call's gradients of q, k and v."""
        unused = torch.empty((), dtype=torch.int64, device=q.device)  # state of dropout, which is not used
        if call.documents is None:
            if more := -q.size(2) % LSE_ROWS:
                lse = F.pad(lse, (0, more), value=torch.inf)
            return ATEN._scaled_dot_product_efficient_attention_backward(
                dout, q, k, v, None, out, lse, unused, unused, 0.0, [True, True, True, False], call.causal, scale=scale
            )[:3]
        longest, bounds, (document_M, place_M) = call.documents
        rows = longest + -longest % LSE_ROWS
        lse_PHL = lse.new_full((len(bounds) - 1, lse.size(1), rows), torch.inf)
        lse_PHL[document_M, :, place_M] = lse.squeeze(0).t()
        dout, q, k, v, out = (t.transpose(1, 2) for t in (dout, q, k, v, out))
        grads = ATEN._efficient_attention_backward(
            dout, q, k, v, None, out, bounds, bounds, longest, longest, lse_PHL, 0.0, unused, unused,
            int(call.causal), False, scale=scale,
        )  # fmt: skip
        return tuple(grad.transpose(1, 2) for grad in grads[:3])


def _largest(given: AttentionInput, lse_BHT: Tensor) -> Tensor:
    """Returns the largest score of each query, which torch's kernels do not return.

    A query whose log-sum-exp is at most the limit of `given.watch` gets its log-sum-exp instead.
    """
    if not lse_BHT.is_cuda:
        exact = PlainAttention().forward(given, largest=True).largest_BHT
        assert exact is not None, "was asked for"
        return exact
    from train.kernels.gpu import triton_scores

    limit = -torch.inf if given.watch is None else given.watch.limit
    return triton_scores.largest_scores(given, lse_BHT, limit)


class FlashAttention(EfficientAttention):
    """torch's FlashAttention kernel, also for documents. It pads narrower values."""

    waste = math.inf

    def _forward(self, call: _Call, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        width = v.size(-1)
        lengths = self._lengths(call, q, k)
        q, k, v = (_tokens(call, _widened(t, q)) for t in (q, k, v))
        out, lse, *_ = ATEN._flash_attention_forward(q, k, v, *lengths, 0.0, call.causal, False, scale=scale)
        if call.documents is not None:  # no axis of sequences: out (M, H, Q), lse (H, M)
            out, lse = out.unsqueeze(0), lse.unsqueeze(0)
        out_BHTV = out.transpose(1, 2)
        return out_BHTV if out.size(-1) == width else positions_first(out_BHTV[..., :width], v.dtype), lse

    def _backward(
        self, call: _Call, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        width, lengths = v.size(-1), self._lengths(call, q, k)
        unused = torch.empty((), dtype=torch.int64, device=q.device)  # state of dropout, which is not used
        dout, q, k, v, out = (_tokens(call, _widened(t, q)) for t in (dout, q, k, v, out))
        lse = lse.contiguous() if call.documents is None else lse.squeeze(0).contiguous()
        grads = ATEN._flash_attention_backward(
            dout, q, k, v, out, lse, *lengths, 0.0, call.causal, unused, unused, scale=scale
        )
        dq, dk, dv = ((g if call.documents is None else g.unsqueeze(0)).transpose(1, 2) for g in grads)
        return dq, dk, dv[..., :width]

    def _lengths(self, call: _Call, q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor | None, int, int]:
        """Returns the document bounds of queries and of keys, and the longest document's length in both.

        Without documents, the bounds are None, and the call counts as one document.
        """
        if call.documents is None:
            return None, None, q.size(2), k.size(2)
        return call.documents.bounds, call.documents.bounds, call.documents.longest, call.documents.longest


def _widened(x: Tensor, like: Tensor) -> Tensor:
    more = like.size(-1) - x.size(-1)
    return F.pad(x, (0, more)) if more else x


def _tokens(call: _Call, x_BHTX: Tensor) -> Tensor:
    """Moves positions before heads. For documents, removes the axis of sequences."""
    x = x_BHTX.transpose(1, 2)
    return x if call.documents is None else x.squeeze(0)


class AttentionByKind(EfficientAttention):
    """Uses one core for calls with all sequences, and another for one sequence."""

    def __init__(self, whole: EfficientAttention, documents: EfficientAttention):
        self.whole, self.documents, self.waste = whole, documents, documents.waste

    def _forward(self, call: _Call, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return self._core(call)._forward(call, q, k, v, scale)

    def _backward(
        self, call: _Call, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._core(call)._backward(call, q, k, v, dout, out, lse, scale)

    def _core(self, call: _Call) -> EfficientAttention:
        return self.whole if call.sequences == slice(None) else self.documents


class CudnnAttention(EfficientAttention):
    """cuDNN's kernel, the fastest core, but not for documents."""

    takes_documents = False

    def __init__(self) -> None:
        self._last_axis: tuple[int, ...] = ()
        """Sizes of the log-sum-exp's axes after the third, which depend on the torch version."""

    def _forward(self, call: _Call, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        assert call.sequences == slice(None), "documents have a core of their own"
        out, lse, *_ = ATEN._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, call.causal, scale=scale)
        self._last_axis = lse.shape[3:]
        return out, lse.view(q.shape[:3])

    def _backward(
        self, call: _Call, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        unused = torch.empty((), dtype=torch.int64, device=q.device)  # state of dropout, which is not used
        lse = lse.contiguous().view(*lse.shape, *self._last_axis)
        return ATEN._scaled_dot_product_cudnn_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            unused,
            unused,
            None,
            None,
            None,
            q.size(2),
            k.size(2),
            0.0,
            call.causal,
            scale=scale,
        )
