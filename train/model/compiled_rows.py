"""Norm, SwiGLU and the split into heads in bf16 on a CPU, and the order of rows, as compiled code: `train/native/rows.cpp`.

Shapes as in layers.py and mla.py. Tensors on the meta device take what real ones would, so that plans count it.
"""

import ctypes
from ctypes import c_float, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from train.model.compiled_attention import Heads
from train.native.model import in_use, library


def fits(*tensors: Tensor) -> bool:
    """Whether compiled code takes such tensors, in this process."""
    return all(t.dtype == torch.bfloat16 and not t.is_cuda for t in tensors) and in_use()


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalised x, and 1 / rms(x) as fp32 (..., 1)."""
    x_ND, y = _rows(x), x.new_empty(x.shape)
    rstd = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    _call("rms_norm_forward", x_ND, x_ND.stride(0), weight_D.contiguous(), y, rstd, *x_ND.shape, eps)
    return y, rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight_D: Tensor, rstd: Tensor, x_needed: bool, weight_needed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x, and of the weight in fp32; each None where it is not needed."""
    x_ND, grad_ND = _rows(x), _rows(grad)
    dx = x.new_empty(x.shape) if x_needed else None
    dweight_D = weight_D.new_empty(weight_D.shape, dtype=torch.float32) if weight_needed else None
    rows = grad_ND, grad_ND.stride(0), x_ND, x_ND.stride(0)
    _call("rms_norm_backward", *rows, weight_D.contiguous(), rstd, dx, dweight_D, *x_ND.shape)
    return dx, dweight_D


def swiglu(h_N2F: Tensor, gates_N: Tensor | None) -> Tensor:
    """silu(gate) * up, times the row's gate value where given: (N, F)."""
    h_N2F, gates_N = _rows(h_N2F), _fp32(gates_N)
    out_NF = h_N2F.new_empty(h_N2F.size(0), h_N2F.size(1) // 2)
    _call("swiglu_forward", h_N2F, h_N2F.stride(0), gates_N, out_NF, *out_NF.shape)
    return out_NF


def swiglu_backward(grad_NF: Tensor, h_N2F: Tensor, gates_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of h and of the gate values."""
    h_N2F, grad_NF, gates32_N = _rows(h_N2F), _rows(grad_NF), _fp32(gates_N)
    dh_N2F = h_N2F.new_empty(h_N2F.shape)
    dgates_N = None if gates32_N is None else torch.empty_like(gates32_N)
    rows = grad_NF, grad_NF.stride(0), h_N2F, h_N2F.stride(0)
    _call("swiglu_backward", *rows, gates32_N, dh_N2F, dgates_N, *grad_NF.shape)
    return dh_N2F, None if dgates_N is None else dgates_N.to(gates_N.dtype)


def sort_by_expert(expert_ids_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`train.model.moe.sort_by_expert`."""
    ids_R = expert_ids_TK.flatten()
    order_R, inverse_R, tokens_R = (torch.empty_like(ids_R) for _ in range(3))
    counts_E = ids_R.new_empty(experts)
    sizes = ids_R.numel(), expert_ids_TK.size(1), experts
    _call("sort_by_expert", ids_R, *sizes, order_R, inverse_R, tokens_R, counts_E)
    return order_R, inverse_R, tokens_R, counts_E


class CompiledHeads(torch.autograd.Function):
    """`train.model.mla.to_heads` on CPU tensors that fit."""

    @staticmethod
    def forward(ctx, q_BTHQ: Tensor, kv_BTHX: Tensor, k_rope_BTR: Tensor, table: Tensor, nope: int):
        B, T, H, Q = q_BTHQ.shape
        ctx.table, ctx.nope = table, nope
        out = [q_BTHQ.new_empty(B, H, T, width) for width in (Q, Q, kv_BTHX.size(3) - nope)]
        given = [_readable(t) for t in (q_BTHQ, kv_BTHX, k_rope_BTR.unsqueeze(2))]
        _split("heads_forward", table, nope, *given, *(t.transpose(1, 2) for t in out))
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_BHTQ: Tensor, dk_BHTQ: Tensor, dv_BHTV: Tensor):
        B, H, T, Q = dq_BHTQ.shape
        dq_BTHQ = dq_BHTQ.new_empty(B, T, H, Q)
        dkv_BTHX = dq_BHTQ.new_empty(B, T, H, ctx.nope + dv_BHTV.size(3))
        shared_BT1R = dq_BHTQ.new_empty(B, T, 1, Q - ctx.nope)
        given = [_readable(t).transpose(1, 2) for t in (dq_BHTQ, dk_BHTQ, dv_BHTV)]
        _split("heads_backward", ctx.table, ctx.nope, dq_BTHQ, dkv_BTHX, shared_BT1R, *given)
        return dq_BTHQ, dkv_BTHX, shared_BT1R.squeeze(2), None, None


def _rows(x: Tensor) -> Tensor:
    """(N, D) with the values of a row side by side; not a copy where rows are evenly spaced."""
    return _readable(x.reshape(-1, x.size(-1)))


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _fp32(gates_N: Tensor | None) -> Tensor | None:
    return None if gates_N is None else gates_N.float().contiguous()


def _split(name: str, table: Tensor, nope: int, *tensors: Tensor) -> None:
    """tensors: q, kv, the shared rope key, queries, keys, values, all (B, T, H, width)."""
    if tensors[0].is_meta:
        return
    q, kv = tensors[:2]
    B, T, H, Q = q.shape
    # Their order in memory is C++'s: head before position.
    heads = [Heads(t.data_ptr(), t.stride(0), t.stride(2), t.stride(1)) for t in tensors]
    problem = _Split(*heads, table.data_ptr(), B, H, T, nope, Q - nope, kv.size(3) - nope)
    getattr(_library(), name)(ctypes.byref(problem), torch.get_num_threads())


def _call(name: str, *arguments: Tensor | int | float | None) -> None:
    if isinstance(arguments[0], Tensor) and arguments[0].is_meta:
        return
    values = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
    getattr(_library(), name)(*values, torch.get_num_threads())


class _Split(ctypes.Structure):
    """`Split` of rows.cpp."""

    _fields_ = [
        *((name, Heads) for name in ("q", "kv", "shared", "queries", "keys", "values")),
        ("table", c_void_p),
        *((name, c_int64) for name in ("batch", "heads", "length", "nope", "rope", "value")),
    ]


@cache
def _library() -> ctypes.CDLL:
    rows = library("rows")
    size, row = [c_int64], [c_void_p, c_int64]  # row: a matrix and the distance of its rows
    for name, arguments in {
        "rms_norm_forward": [*row, *[c_void_p] * 3, *size * 2, c_float],
        "rms_norm_backward": [*row * 2, *[c_void_p] * 4, *size * 2],
        "swiglu_forward": [*row, *[c_void_p] * 2, *size * 2],
        "swiglu_backward": [*row * 2, *[c_void_p] * 3, *size * 2],
        "sort_by_expert": [c_void_p, *size * 3, *[c_void_p] * 4],
        "heads_forward": [ctypes.POINTER(_Split)],
        "heads_backward": [ctypes.POINTER(_Split)],
    }.items():
        function = getattr(rows, name)
        function.argtypes, function.restype = [*arguments, c_int64], None  # the last: threads
    return rows
