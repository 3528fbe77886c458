"""The attention core on a CPU as compiled code: `train/native/attention.cpp`."""

import ctypes
from ctypes import c_float, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from train.native.model import library

Spans = list[tuple[int, int, int]]


def fits(q_BHTQ: Tensor) -> bool:
    """Whether the kernel takes such heads."""
    return q_BHTQ.dtype == torch.bfloat16


class CompiledAttention(torch.autograd.Function):
    """`train.model.attention` on CPU tensors that fit. spans: (sequence, start, end) of every document.

    The probabilities of a span are kept for backward where they take about as much memory as its queries, keys and values,
    or less; those of longer ones are computed again, so memory is linear in the sequence.
    """

    @staticmethod
    def forward(ctx, q_BHTQ: Tensor, k_BHTQ: Tensor, v_BHTV: Tensor, scale: float, spans: Spans | None) -> Tensor:
        q, k, v = (_readable(t) for t in (q_BHTQ, k_BHTQ, v_BHTV))
        B, H, T, V = v.shape
        ctx.scale, ctx.table = scale, _table([(b, 0, T) for b in range(B)] if spans is None else spans)
        longest = 2 * (2 * q.size(-1) + V) if any(ctx.needs_input_grad) else 0
        kept = v.new_empty(_library().attention_kept(ctx.table, len(ctx.table), H, longest))
        ctx.save_for_backward(q, k, v, kept)
        out_BHTV = v.new_empty(B, T, H, V).transpose(1, 2)  # as the output projection wants it
        _call("attention_forward", ctx.table, scale, kept, q=q, k=k, v=v, out=out_BHTV)
        return out_BHTV

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_BHTV: Tensor):
        q, k, v, kept = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        dout = _readable(dout_BHTV)
        _call("attention_backward", ctx.table, ctx.scale, kept, q=q, k=k, v=v, dout=dout, dq=dq, dk=dk, dv=dv)
        return dq, dk, dv, None, None


def _readable(t: Tensor) -> Tensor:
    """The same with the channels of a position side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _table(spans: Spans) -> ctypes.Array:
    return (_Span * len(spans))(*spans)


def _call(name: str, table: ctypes.Array, scale: float, kept: Tensor, **tensors: Tensor) -> None:
    q, v = tensors["q"], tensors["v"]
    if q.is_meta:
        return  # plans want to know what is allocated only
    longest = max((span.end - span.start for span in table), default=0)
    problem = _Problem(
        kept=kept.data_ptr(), heads=q.size(1), qk=q.size(-1), width=v.size(-1), longest=longest, scale=scale
    )
    for field, tensor in tensors.items():
        setattr(problem, field, Heads(tensor.data_ptr(), *tensor.stride()[:3]))
    getattr(_library(), name)(ctypes.byref(problem), table, len(table), torch.get_num_threads())


@cache
def _library() -> ctypes.CDLL:
    attention = library("attention")
    for function in (attention.attention_forward, attention.attention_backward):
        function.argtypes = [ctypes.POINTER(_Problem), ctypes.POINTER(_Span), c_int64, c_int64]
        function.restype = None
    attention.attention_kept.argtypes = [ctypes.POINTER(_Span), *[c_int64] * 3]
    attention.attention_kept.restype = c_int64
    return attention


class Heads(ctypes.Structure):
    """A tensor of heads in memory as C++ sees it."""

    _fields_ = [("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("position", c_int64)]


class _Span(ctypes.Structure):
    """`Span` of attention.cpp."""

    _fields_ = [(name, c_int64) for name in ("sequence", "start", "end", "kept")]


class _Problem(ctypes.Structure):
    """`Problem` of attention.cpp."""

    _fields_ = [
        *((name, Heads) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")),
        ("kept", c_void_p),
        *((name, c_int64) for name in ("heads", "qk", "width", "longest")),
        ("scale", c_float),
    ]
