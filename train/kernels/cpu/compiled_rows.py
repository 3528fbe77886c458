"""Computes norm, SwiGLU, head split, loss and row sorting in bf16 in compiled code: `train/kernels/cpu/rows.cpp`.

Shapes as in train/model/operations.py. On the meta device, the functions create the same tensors as in a run, so
mode=plan can count their memory.
"""

from ctypes import c_bool, c_float, c_int64
from functools import partial

import torch
from torch import Tensor

from train.kernels.cpu.cpp_function import Array, Kernel, Number, Size, Struct, Threads
from train.kernels.cpu.libraries import library
from train.model.needed import Function, once_differentiable

_BF16, _FP32, _INT64 = torch.bfloat16, torch.float32, torch.int64
_load = partial(library, "rows")

_rms_norm_forward = Kernel(
    _load, "rms_norm_forward",
    x=Array(_BF16, "N D", apart=1), weight=Array(_BF16, "D"), y=Array(_BF16, "*N D", out=True),
    rstd=Array(_FP32, "*N 1", out=True), rows=Size("N"), width=Size("D"), eps=Number(c_float), threads=Threads(),
)  # fmt: skip
_rms_norm_backward = Kernel(
    _load, "rms_norm_backward",
    grad=Array(_BF16, "N D", apart=1), x=Array(_BF16, "N D", apart=1), weight=Array(_BF16, "D"),
    rstd=Array(_FP32, "*N 1"), dx=Array(_BF16, "*N D", out=True, optional=True),
    dweight=Array(_FP32, "D", out=True, optional=True), rows=Size("N"), width=Size("D"), threads=Threads(),
)  # fmt: skip
_swiglu_forward = Kernel(
    _load, "swiglu_forward",
    h=Array(_BF16, "N 2*F", apart=1), gates=Array(_FP32, "N", optional=True), out=Array(_BF16, "N F", out=True),
    rows=Size("N"), inner=Size("F"), threads=Threads(),
)  # fmt: skip
_swiglu_backward = Kernel(
    _load, "swiglu_backward",
    grad=Array(_BF16, "N F", apart=1), h=Array(_BF16, "N 2*F", apart=1), gates=Array(_FP32, "N", optional=True),
    dh=Array(_BF16, "N 2*F", out=True), dgates=Array(_FP32, "N", out=True, optional=True),
    rows=Size("N"), inner=Size("F"), threads=Threads(),
)  # fmt: skip
_sort_by_expert = Kernel(
    _load, "sort_by_expert", c_bool,
    expert=Array(_INT64, "T K"), order=Array(_INT64, "T*K", out=True), inverse=Array(_INT64, "T*K", out=True),
    tokens=Array(_INT64, "T*K", out=True), counts=Array(_INT64, "E", out=True),
    rows=Size("T*K"), k=Size("K"), experts=Size("E"),
)  # fmt: skip
_best_keys = Kernel(
    _load, "best_keys",
    scores=Array(_FP32, "T S", apart=1), best=Array(torch.int32, "T K", out=True),
    rows=Size("T"), width=Size("S"), k=Size("K"), threads=Threads(),
)  # fmt: skip
_cross_entropy = Kernel(
    _load, "cross_entropy", c_bool,
    logits=Array(_BF16, "N V", out=True), targets=Array(_INT64, "N"), losses=Array(_FP32, "N", out=True),
    rows=Size("N"), width=Size("V"), scale=Number(c_float), gradient=Number(c_bool), threads=Threads(),
)  # fmt: skip


def _heads(name: str, back: bool) -> Kernel:
    """Declares the function that computes queries, keys and values from projections (q, kv, shared). back: whether to
    declare its backward instead.
    """
    first = {"q": "B T H nope+R", "kv": "B T H nope+V", "shared": "B T 1 R"}
    second = {"queries": "B H T nope+R", "keys": "B H T nope+R", "values": "B H T V"}
    split = Struct(
        **{tensor: Array(_BF16, sizes, apart=3, out=back) for tensor, sizes in first.items()},
        **{tensor: Array(_BF16, sizes, apart=3, out=not back) for tensor, sizes in second.items()},
        table=Array(torch.complex64, "T R/2"), batch=Size("B"), heads=Size("H"), length=Size("T"),
        nope=Number(c_int64), rope=Size("R"), value=Size("V"),
    )  # fmt: skip
    return Kernel(_load, name, split=split, threads=Threads())


_heads_forward, _heads_backward = _heads("heads_forward", back=False), _heads("heads_backward", back=True)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns x / rms(x) * weight, and 1 / rms(x) as fp32 (..., 1)."""
    x_ND, y = _rows(x), x.new_empty(x.shape)
    rstd = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    _rms_norm_forward(x_ND, weight_D.contiguous(), y, rstd, eps)
    return y, rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight_D: Tensor, rstd: Tensor, x_needed: bool, weight_needed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of x, and of the weight in fp32; None if not needed."""
    dx = x.new_empty(x.shape) if x_needed else None
    dweight_D = weight_D.new_empty(weight_D.shape, dtype=torch.float32) if weight_needed else None
    _rms_norm_backward(_rows(grad), _rows(x), weight_D.contiguous(), rstd, dx, dweight_D)
    return dx, dweight_D


def swiglu(h_N2F: Tensor, gates_N: Tensor | None) -> Tensor:
    """Returns silu(gate) * up, (N, F), times each row's gate value if given."""
    h_N2F, gates_N = _rows(h_N2F), _fp32(gates_N)
    out_NF = h_N2F.new_empty(h_N2F.size(0), h_N2F.size(1) // 2)
    _swiglu_forward(h_N2F, gates_N, out_NF)
    return out_NF


def swiglu_backward(grad_NF: Tensor, h_N2F: Tensor, gates_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients of h and of the gate values."""
    h_N2F, grad_NF, gates32_N = _rows(h_N2F), _rows(grad_NF), _fp32(gates_N)
    dh_N2F = h_N2F.new_empty(h_N2F.shape)
    dgates_N = None if gates32_N is None else torch.empty_like(gates32_N)
    _swiglu_backward(grad_NF, h_N2F, gates32_N, dh_N2F, dgates_N)
    return dh_N2F, None if gates_N is None or dgates_N is None else dgates_N.to(gates_N.dtype)


def sort_by_expert(expert_ids_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Implements `train.model.operations.Kernels.sort_by_expert`."""
    ids_TK = expert_ids_TK.contiguous()
    order_R, inverse_R, tokens_R = (ids_TK.new_empty(ids_TK.numel()) for _ in range(3))
    counts_E = ids_TK.new_empty(experts)
    sorted_all = _sort_by_expert(ids_TK, order_R, inverse_R, tokens_R, counts_E)
    assert sorted_all is not False, f"expert ids must be in [0, {experts}), and some are not"
    return order_R, inverse_R, tokens_R, counts_E


def largest_keys(scores_TS: Tensor, top_k: int) -> Tensor:
    """Implements `train.model.indexer.best_keys`."""
    best_TK = scores_TS.new_empty(len(scores_TS), top_k, dtype=torch.int32)
    _best_keys(scores_TS, best_TK)
    return best_TK


def cross_entropy_of_logits(logits_NV: Tensor, targets_N: Tensor, scale: float | None) -> Tensor:
    """Implements `train.model.operations.Kernels.cross_entropy`."""
    losses_N = logits_NV.new_empty(len(logits_NV), dtype=torch.float32)
    known = _cross_entropy(logits_NV, targets_N.contiguous(), losses_N, scale or 0.0, scale is not None)
    assert known is not False, f"targets must be in [0, {logits_NV.size(1)}), and some are not"
    return losses_N.sum()


class CompiledHeads(Function):
    """Implements `train.model.operations.Kernels.to_heads` in bf16."""

    @staticmethod
    def forward(ctx, q_BTHQ: Tensor, kv_BTHX: Tensor, k_rope_BTR: Tensor, table: Tensor, nope: int):
        B, T, H, Q = q_BTHQ.shape
        ctx.table, ctx.nope = table, nope
        out = [q_BTHQ.new_empty(B, H, T, width) for width in (Q, Q, kv_BTHX.size(3) - nope)]
        given = [_readable(t) for t in (q_BTHQ, kv_BTHX, k_rope_BTR.unsqueeze(2))]
        _heads_forward(*given, *out, table, nope)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_BHTQ: Tensor, dk_BHTQ: Tensor, dv_BHTV: Tensor):
        B, H, T, Q = dq_BHTQ.shape
        dq_BTHQ = dq_BHTQ.new_empty(B, T, H, Q)
        dkv_BTHX = dq_BHTQ.new_empty(B, T, H, ctx.nope + dv_BHTV.size(3))
        shared_BT1R = dq_BHTQ.new_empty(B, T, 1, Q - ctx.nope)
        given = [_readable(t) for t in (dq_BHTQ, dk_BHTQ, dv_BHTV)]
        _heads_backward(dq_BTHQ, dkv_BTHX, shared_BT1R, *given, ctx.table, ctx.nope)
        return dq_BTHQ, dkv_BTHX, shared_BT1R.squeeze(2), None, None


def _rows(x: Tensor) -> Tensor:
    """Returns x as (N, D) with contiguous rows, copied if rows are unevenly spaced."""
    return _readable(x.reshape(-1, x.size(-1)))


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _fp32(gates_N: Tensor | None) -> Tensor | None:
    return None if gates_N is None else gates_N.float().contiguous()
