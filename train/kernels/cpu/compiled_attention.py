"""Computes attention on a CPU in compiled code: `train/kernels/cpu/attention.cpp`."""

from ctypes import c_float, c_int64
from functools import partial

import torch
from torch import Tensor

from train.kernels.cpu.cpp_function import (
    Array,
    Kernel,
    Number,
    Parameter,
    Size,
    Struct,
    Table,
    Threads,
    Zeros,
    rows_of_table,
)
from train.kernels.cpu.libraries import library
from train.kernels.plain.plain_attention import PlainAttention
from train.model.attention import AttentionInput, AttentionOutput

Spans = list[tuple[int, int, int]]
"""Intervals (sequence, start, end) of positions that attend to each other."""

_load = partial(library, "attention")
_attention_kept = Kernel(
    _load, "attention_kept", c_int64, spans=Table(4), heads=Number(c_int64), longest=Number(c_int64)
)  # fmt: skip


def _heads(width: str, out: bool = False) -> Array:
    return Array(torch.bfloat16, f"B H T {width}", apart=3, out=out)


def _rows(out: bool) -> Array:
    return Array(torch.float32, "B H T", out=out, optional=True)


def _problem(**arrays: Parameter) -> Struct:
    """Declares the struct `Problem` of attention.cpp."""
    return Struct(
        q=_heads("Q"), k=_heads("Q"), v=_heads("V"), **arrays, heads=Size("H"), length=Size("T"), qk=Size("Q"),
        width=Size("V"), longest=Number(c_int64), scale=Number(c_float),
    )  # fmt: skip


_attention_forward = Kernel(
    _load, "attention_forward",
    problem=_problem(
        out=_heads("V", out=True), dout_dq_dk_dv=Zeros(16), kept=Array(torch.bfloat16, "P", out=True), lse=_rows(out=True),
        largest=_rows(out=True),
    ),
    spans=Table(4), threads=Threads(),
)  # fmt: skip
_attention_backward = Kernel(
    _load, "attention_backward",
    problem=_problem(
        out=_heads("V"), dout=_heads("V"), dq=_heads("Q", out=True), dk=_heads("Q", out=True), dv=_heads("V", out=True),
        kept=Array(torch.bfloat16, "P"), lse=_rows(out=False), largest=Zeros(1),
    ),
    spans=Table(4), threads=Threads(),
)  # fmt: skip


class CompiledAttention(PlainAttention):
    """Computes causal attention within complete sequences or documents, with compiled code for bf16.

    Other inputs use torch operations. Forward saves the attention probabilities if they need at most about as much
    memory as queries, keys and values. Otherwise, backward recomputes them.
    """

    def forward(self, given: AttentionInput, keep: bool = False, largest: bool = False) -> AttentionOutput:
        spans = _spans(given)
        if spans is None:
            return super().forward(given, keep, largest)
        q, k, v = map(_readable, given[:3])
        B, H, T, V = v.shape
        rows = rows_of_table((*span, 0) for span in spans)
        kept = v.new_empty(
            _attention_kept(rows, H, _most_kept(given) if keep else 0)
        )  # also writes the offset of each interval's saved values into `rows`
        out_BHTV = v.new_empty(B, T, H, V).transpose(1, 2)
        lse_BHT = v.new_empty(B, H, T, dtype=torch.float32)
        largest_BHT = torch.empty_like(lse_BHT) if largest else None
        _attention_forward(q, k, v, out_BHTV, kept, lse_BHT, largest_BHT, _longest(spans), given.scale, rows)
        return AttentionOutput(out_BHTV, lse_BHT, largest_BHT, kept)

    def backward(
        self, dout_BHTV: Tensor, given: AttentionInput, made: AttentionOutput
    ) -> tuple[Tensor, Tensor, Tensor]:
        spans = _spans(given)
        if spans is None:
            return super().backward(dout_BHTV, given, made)
        q, k, v, dout = map(_readable, (*given[:3], dout_BHTV))
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        rows = rows_of_table((*span, 0) for span in spans)
        kept = v.new_empty(0) if made.kept is None else made.kept
        _attention_kept(rows, v.size(1), _most_kept(given) if kept.numel() else 0)
        _attention_backward(
            q, k, v, _readable(made.out_BHTV), dout, dq, dk, dv, kept, made.lse_BHT, _longest(spans), given.scale, rows
        )
        return dq, dk, dv


def _spans(given: AttentionInput) -> Spans | None:
    """Returns the intervals of the input's positions; None if the compiled code does not support the input."""
    if given.q_BHTQ.dtype != torch.bfloat16:
        return None
    B, _, T, _ = given.q_BHTQ.shape
    spans: Spans = []
    for sequence, first, last, *keys in given.seen.rectangles:
        if keys != [first, last, 0]:
            return None
        spans += [(b, first, last) for b in (range(B) if sequence is None else [sequence])]
    return spans if sum(last - first for _, first, last in spans) == B * T else None


def _longest(spans: Spans) -> int:
    return max((end - start for _, start, end in spans), default=0)


def _most_kept(given: AttentionInput) -> int:
    """Returns the length of the longest interval whose probabilities are saved."""
    return 2 * (2 * given.q_BHTQ.size(-1) + given.v_BHSV.size(-1))


def _readable(t: Tensor) -> Tensor:
    """Returns the tensor with a contiguous last axis."""
    return t if t.stride(-1) == 1 else t.contiguous()
