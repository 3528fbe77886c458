"""The attention core on a CPU as compiled code: `train/native/attention.cpp`."""

import ctypes
from ctypes import c_float, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from train.native.model import library

Spans = list[tuple[int, int, int]]


def fits(q_BHTQ: Tensor, v_BHTV: Tensor) -> bool:
    """Whether the kernel takes such heads."""
    return q_BHTQ.dtype == torch.bfloat16 and q_BHTQ.size(-1) % 2 == 0 and v_BHTV.size(-1) % 2 == 0


class CompiledAttention(torch.autograd.Function):
    """`train.model.attention` on CPU tensors that fit. spans: (sequence, start, end) of every document."""

    @staticmethod
    def forward(ctx, q_BHTQ: Tensor, k_BHTQ: Tensor, v_BHTV: Tensor, scale: float, spans: Spans | None) -> Tensor:
        q, k, v = (_readable(t) for t in (q_BHTQ, k_BHTQ, v_BHTV))
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.spans = scale, spans
        B, H, T, V = v.shape
        out_BHTV = v.new_empty(B, T, H, V).transpose(1, 2)  # as the output projection wants it
        _call("attention_forward", spans, scale, q=q, k=k, v=v, out=out_BHTV)
        return out_BHTV

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_BHTV: Tensor):
        q, k, v = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        dout = _readable(dout_BHTV)
        _call("attention_backward", ctx.spans, ctx.scale, q=q, k=k, v=v, dout=dout, dq=dq, dk=dk, dv=dv)
        return dq, dk, dv, None, None


def _readable(t: Tensor) -> Tensor:
    """The same with the channels of a position side by side, in whole words."""
    return t if t.stride(-1) == 1 and t.stride(-2) % 2 == 0 and t.storage_offset() % 2 == 0 else t.contiguous()


def _call(name: str, spans: Spans | None, scale: float, **tensors: Tensor) -> None:
    q, v = tensors["q"], tensors["v"]
    if q.is_meta:
        return  # plans want to know what is allocated only
    B, H, T, Q = q.shape
    spans = [(b, 0, T) for b in range(B)] if spans is None else spans
    longest = max((end - start for _, start, end in spans), default=0)
    problem = _Problem(heads=H, qk=Q, width=v.shape[-1], longest=longest, scale=scale)
    for field, tensor in tensors.items():
        setattr(problem, field, Heads(tensor.data_ptr(), *tensor.stride()[:3]))
    table = (c_int64 * (3 * len(spans)))(*(number for span in spans for number in span))
    getattr(_library(), name)(ctypes.byref(problem), table, len(spans), torch.get_num_threads())


@cache
def _library() -> ctypes.CDLL:
    attention = library("attention")
    for function in (attention.attention_forward, attention.attention_backward):
        function.argtypes = [ctypes.POINTER(_Problem), c_void_p, c_int64, c_int64]
        function.restype = None
    return attention


class Heads(ctypes.Structure):
    """A tensor of heads in memory as C++ sees it."""

    _fields_ = [("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("position", c_int64)]


class _Problem(ctypes.Structure):
    """`Problem` of attention.cpp."""

    _fields_ = [
        *((name, Heads) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")),
        *((name, c_int64) for name in ("heads", "qk", "width", "longest")),
        ("scale", c_float),
    ]
