"""Matrix products of bf16 on a CPU as compiled code: `train/native/products.cpp`.

Values are exact in fp32 and so are their products; sums are in fp32 and rounded once, to the format asked for. Of a
weight's gradient that is fp32, as paper 3.3.3 keeps it.

Shape suffixes: O, N outer axes of a product, C contraction, E experts, R rows sorted by expert.
"""

import ctypes
from collections.abc import Sequence
from contextlib import nullcontext
from ctypes import c_int64, c_void_p
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from train.model import compiled_rows
from train.model.needed import gradients_needed
from train.native.model import library, products_pay

Part = tuple[int, int, int, int, int, int]
"""One product: first row on the left, rows, matrix on the right, first and last of the contraction, offset of its output."""


def fits(*tensors: Tensor) -> bool:
    """Whether compiled code multiplies such tensors, in this process."""
    return compiled_rows.fits(*tensors) and products_pay()


def fastest_product(left_OC: Tensor, right_NC: Tensor, dtype: torch.dtype) -> Tensor:
    """left right^T by compiled code, where that takes them and is faster, or by torch: (O, N)."""
    if fits(left_OC, right_NC):
        return product(left_OC, right_NC, dtype)
    return (left_OC @ right_NC.t()).to(dtype)


def product(left_OC: Tensor, right_NC: Tensor, dtype: torch.dtype) -> Tensor:
    """left right^T: (O, N)."""
    (rows, contraction), columns = left_OC.shape, right_NC.shape[0]
    out_ON = left_OC.new_empty(rows, columns, dtype=dtype)
    run("gemm", left_OC, right_NC, out_ON, [(0, rows, 0, 0, contraction, 0)])
    return out_ON


def grouped(left_RC: Tensor, right_ENC: Tensor, rows: Sequence[int]) -> Tensor:
    """Each expert's rows times its own matrix, transposed: (R, N). rows: of every expert."""
    _, columns, contraction = right_ENC.shape
    out_RN = left_RC.new_empty(left_RC.shape[0], columns)
    run("grouped_gemm", left_RC, right_ENC, out_RN, parts_by_rows(_starts(rows), rows, columns, contraction))
    return out_RN


def grouped_weight_gradient(left_OR: Tensor, right_NR: Tensor, rows: Sequence[int]) -> Tensor:
    """For each expert the sum over its rows: (E, O, N), fp32."""
    outer, columns = left_OR.shape[0], right_NR.shape[0]
    out_EON = left_OR.new_empty(len(rows), outer, columns, dtype=torch.float32)
    run("grouped_gemm", left_OR, right_NR, out_EON, parts_by_sums(_starts(rows), rows, outer, columns))
    return out_EON


def parts_by_rows(starts: Sequence[int], rows: Sequence[int], columns: int, contraction: int) -> list[Part]:
    """Of every expert its rows on the left times its matrix on the right. starts: first row of each."""
    return [(s, n, e, 0, contraction, s * columns) for e, (s, n) in enumerate(zip(starts, rows, strict=True))]


def parts_by_sums(starts: Sequence[int], rows: Sequence[int], outer: int, columns: int) -> list[Part]:
    """Of every expert the sum over its rows, which are the contraction."""
    return [(0, outer, 0, s, s + n, e * outer * columns) for e, (s, n) in enumerate(zip(starts, rows, strict=True))]


def _starts(rows: Sequence[int]) -> list[int]:
    return list(accumulate(rows, initial=0))[:-1]


class CompiledLinear(torch.autograd.Function):
    """`F.linear` without bias on tensors that fit."""

    @staticmethod
    def forward(ctx, x: Tensor, weight_NC: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_NC)
        return product(_rows(x), weight_NC, x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight_NC = ctx.saved_tensors
        x_needed, weight_needed = gradients_needed(ctx)
        dy_ON, dx = _rows(dy), None
        if x_needed:
            dx = product(dy_ON, weight_NC.t(), x.dtype).view(x.shape)
        return dx, product(dy_ON.t(), _rows(x).t(), torch.float32) if weight_needed else None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.size(-1))


def run(name: str, left: Tensor, right: Tensor, out: Tensor, parts: Sequence[Part], scales=((), ())) -> None:
    """Write the parts' products, (O, C) or (E, O, C) on either side, into out.

    name: for torch's profiler, which sees nothing of compiled code by itself. scales: of left and right, see `_Operand`.
    """
    left, right = readable(left), readable(right)
    if out.is_meta:
        return  # plans want to know what is allocated only
    columns = out.shape[-1]
    operands = (_Operand(x.data_ptr(), *strides(x), *scale) for x, scale in zip((left, right), scales, strict=True))
    problem = _Problem(*operands, out.data_ptr(), columns, columns, out.dtype == torch.float32)
    numbers = [number for part in parts for number in part]
    table = (c_int64 * len(numbers))(*numbers)
    # A name costs a percent of the step of a small model, also where nobody reads it.
    with record_function(name) if torch.autograd._profiler_enabled() else nullcontext():
        _library().products(ctypes.byref(problem), table, len(parts), torch.get_num_threads())


def readable(x: Tensor) -> Tensor:
    """The same, side by side in memory along the last axis or the one before, and with its values there
    (`parallel.expert.quantized_rows` has others, and gives them to torch's operations alone).
    """
    x = x if type(x) in (Tensor, torch.nn.Parameter) else x.view(x.shape)
    return x if 1 in x.stride()[-2:] else x.contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of matrices, rows and columns."""
    return (0, *x.stride()) if x.dim() == 2 else x.stride()


@cache
def _library() -> ctypes.CDLL:
    compiled = library("products")
    compiled.products.argtypes = [ctypes.POINTER(_Problem), c_void_p, c_int64, c_int64]
    compiled.products.restype = None
    return compiled


class _Operand(ctypes.Structure):
    """`Operand` of products.cpp. What follows the strides of the values belongs to scales and may be left out."""

    _fields_ = [
        ("data", c_void_p), ("matrix", c_int64), ("outer", c_int64), ("inner", c_int64),
        ("scale", c_void_p), ("scale_matrix", c_int64), ("scale_outer", c_int64), ("scale_tile", c_int64), ("shift", c_int64),
    ]  # fmt: skip


class _Problem(ctypes.Structure):
    """`Problem` of products.cpp."""

    _fields_ = [
        ("left", _Operand), ("right", _Operand), ("out", c_void_p),
        ("columns", c_int64), ("out_stride", c_int64), ("fp32", c_int64),
    ]  # fmt: skip
