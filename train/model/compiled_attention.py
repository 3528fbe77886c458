"""The attention core on a CPU as compiled code: `train/native/attention.cpp`."""

from ctypes import c_float, c_int64
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from train.native.kernel import Array, Kernel, Number, Parameter, Size, Struct, Table, Threads, Zeros, table
from train.native.model import library

Spans = list[tuple[int, int, int]]

_load = partial(library, "attention")
_attention_kept = Kernel(
    _load, "attention_kept", c_int64, spans=Table(4), heads=Number(c_int64), longest=Number(c_int64)
)  # fmt: skip


def _heads(width: str, out: bool = False) -> Array:
    return Array(torch.bfloat16, f"B H T {width}", apart=3, out=out)


def _problem(**arrays: Parameter) -> Struct:
    """`Problem` of attention.cpp."""
    return Struct(
        q=_heads("Q"), k=_heads("Q"), v=_heads("V"), **arrays, heads=Size("H"), qk=Size("Q"), width=Size("V"),
        longest=Number(c_int64), scale=Number(c_float),
    )  # fmt: skip


_attention_forward = Kernel(
    _load, "attention_forward",
    problem=_problem(out=_heads("V", out=True), dout_dq_dk_dv=Zeros(16), kept=Array(torch.bfloat16, "P", out=True)),
    spans=Table(4), threads=Threads(),
)  # fmt: skip
_attention_backward = Kernel(
    _load, "attention_backward",
    problem=_problem(
        out=Zeros(4), dout=_heads("V"), dq=_heads("Q", out=True), dk=_heads("Q", out=True), dv=_heads("V", out=True),
        kept=Array(torch.bfloat16, "P"),
    ),
    spans=Table(4), threads=Threads(),
)  # fmt: skip


class CompiledAttention(torch.autograd.Function):
    """`train.model.kernels.Kernels.attention` in bf16. spans: (sequence, start, end) of every document.

    The probabilities of a span are kept for backward where they take about as much memory as its queries, keys and values,
    or less; those of longer ones are recomputed, so memory is linear in the sequence.
    """

    @staticmethod
    def forward(ctx, q_BHTQ: Tensor, k_BHTQ: Tensor, v_BHTV: Tensor, scale: float, spans: Spans | None) -> Tensor:
        q, k, v = (_readable(t) for t in (q_BHTQ, k_BHTQ, v_BHTV))
        B, H, T, V = v.shape
        spans = [(b, 0, T) for b in range(B)] if spans is None else spans
        assert all(0 <= b < B and 0 <= start <= end <= T for b, start, end in spans), (spans, q.shape)
        ctx.scale, ctx.longest = scale, max((end - start for _, start, end in spans), default=0)
        ctx.table = table((*span, 0) for span in spans)
        keep = 2 * (2 * q.size(-1) + V) if any(ctx.needs_input_grad) else 0
        kept = v.new_empty(_attention_kept(ctx.table, H, keep))  # and writes into the table what is kept where
        ctx.save_for_backward(q, k, v, kept)
        out_BHTV = v.new_empty(B, T, H, V).transpose(1, 2)  # as the output projection wants it
        _attention_forward(q, k, v, out_BHTV, kept, ctx.longest, scale, ctx.table)
        return out_BHTV

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_BHTV: Tensor):
        q, k, v, kept = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        _attention_backward(q, k, v, _readable(dout_BHTV), dq, dk, dv, kept, ctx.longest, ctx.scale, ctx.table)
        return dq, dk, dv, None, None


def _readable(t: Tensor) -> Tensor:
    """The same with the channels of a position side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()
