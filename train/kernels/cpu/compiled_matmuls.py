"""Computes bf16 matmuls on a CPU in compiled code: `train/kernels/cpu/products.cpp`.

Sums are in fp32, and only the complete sum is rounded. Weight gradients are fp32 (paper 3.3.3).

Shape suffixes: O, N outer axes of a matmul, C contraction, E experts, R rows sorted by expert.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from ctypes import c_int64
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor
from torch.profiler import record_function

from train.kernels.cpu.cpp_function import (
    PLAIN_CLASSES,
    Array,
    Kernel,
    Number,
    Parameter,
    Size,
    Struct,
    Table,
    Threads,
    rows_of_table,
)
from train.kernels.cpu.libraries import library

NO_SCALES = (None, 0)
"""Scales and shift of an operand without scales."""


def _operand(side: str, matrices: str, outer: str) -> dict[str, Parameter]:
    """Declares the struct `Operand` of products.cpp: values (N, C) or (E, N, C), and their scales or None.

    A scale applies to 1 << shift elements of the outer axis, and to a tile of C.
    """
    return {
        side: Array(torch.bfloat16, f"*{matrices} {outer} C", apart=3, beside=2),
        f"{side}_scale": Array(
            torch.float32, f"*{matrices} -(-{outer}>>{side}_shift) -(-C>>7)", apart=3, beside=0, optional=True
        ),
        f"{side}_shift": Number(c_int64),
    }


_matmuls = Kernel(
    partial(library, "products"), "products",
    problem=Struct(
        **_operand("left", "1", "O"), **_operand("right", "E", "N"),
        out=Array((torch.bfloat16, torch.float32), "*M N", out=True), fp32=Size("out_dtype"),
        columns=Size("N"), out_stride=Size("N"), into=Number(c_int64),
    ),
    parts=Table(6), threads=Threads(),
)  # fmt: skip

Part = tuple[int, int, int, int, int, int]
"""One matmul: first row, number of rows, index of the right matrix, start and end of the contraction, output offset."""


def matmul(left_OC: Tensor, right_NC: Tensor, dtype: torch.dtype, into_ON: Tensor | None = None) -> Tensor:
    """Computes left @ right^T, (O, N), into a new tensor, or adds it to `into_ON` (fp32)."""
    (rows, contraction), columns = left_OC.shape, right_NC.shape[0]
    out_ON = left_OC.new_empty(rows, columns, dtype=dtype) if into_ON is None else into_ON
    run_matmuls("gemm", left_OC, right_NC, out_ON, [(0, rows, 0, 0, contraction, 0)], into=into_ON is not None)
    return out_ON


def grouped(left_RC: Tensor, right_ENC: Tensor, rows: Sequence[int]) -> Tensor:
    """Multiplies each expert's rows by its transposed matrix: (R, N). rows: number of rows per expert."""
    _, columns, contraction = right_ENC.shape
    out_RN = left_RC.new_empty(left_RC.shape[0], columns)
    run_matmuls("grouped_gemm", left_RC, right_ENC, out_RN, parts_by_rows(_starts(rows), rows, columns, contraction))
    return out_RN


def grouped_weight_gradient(
    left_OR: Tensor, right_NR: Tensor, rows: Sequence[int], dtype: torch.dtype, into_EON: Tensor | None = None
) -> Tensor:
    """Computes each expert's weight gradient, a sum over its rows: (E, O, N). into_EON: see `matmul`."""
    outer, columns = left_OR.shape[0], right_NR.shape[0]
    out_EON = left_OR.new_empty(len(rows), outer, columns, dtype=dtype) if into_EON is None else into_EON
    parts = parts_by_sums(_starts(rows), rows, outer, columns)
    run_matmuls("grouped_gemm", left_OR, right_NR, out_EON, parts, into=into_EON is not None)
    return out_EON


def parts_by_rows(starts: Sequence[int], rows: Sequence[int], columns: int, contraction: int) -> list[Part]:
    """Returns one `Part` per expert: its rows (left) times its matrix (right). starts: first row of each expert."""
    return [(s, n, e, 0, contraction, s * columns) for e, (s, n) in enumerate(zip(starts, rows, strict=True))]


def parts_by_sums(starts: Sequence[int], rows: Sequence[int], outer: int, columns: int) -> list[Part]:
    """Returns one `Part` per expert: a sum over its rows."""
    return [(0, outer, 0, s, s + n, e * outer * columns) for e, (s, n) in enumerate(zip(starts, rows, strict=True))]


def _starts(rows: Sequence[int]) -> list[int]:
    return list(accumulate(rows, initial=0))[:-1]


def run_matmuls(
    name: str, left: Tensor, right: Tensor, out: Tensor, parts: Sequence[Part], left_scales=NO_SCALES, right_scales=NO_SCALES,
    into: bool = False,
) -> None:  # fmt: skip
    """Write the results of the matmuls in `parts` into `out`, or add them to `out` (fp32).

    Operands are (O, C) or (E, O, C).

    name: name of the matmul in torch's profiler.
    left_scales, right_scales: see `_operand`.
    into: whether to add to `out`.
    """
    assert not into or out.dtype == torch.float32, out.dtype
    left, right = readable(left), readable(right)
    (outer, contraction), (*matrices, columns, _), places = left.shape, right.shape, out.numel()
    count = matrices[0] if matrices else 1
    assert all(
        0 <= first <= first + rows <= outer and 0 <= of < count and 0 <= begin <= end <= contraction
        and 0 <= place <= place + rows * columns <= places
        for first, rows, of, begin, end, place in parts
    ), (parts, left.shape, right.shape, out.shape)  # fmt: skip
    # Naming costs 1 % of a small model's step, so the call has a name only while a profiler runs.
    with record_function(name) if torch.autograd._profiler_enabled() else nullcontext():
        _matmuls(left, *left_scales, right, *right_scales, out, int(into), rows_of_table(parts))


def readable(x: Tensor) -> Tensor:
    """Returns x as a plain tensor that is contiguous along one of its last two axes.

    A tensor subclass may store its values elsewhere (`parallel.expert.wire`).
    """
    x = x if type(x) in PLAIN_CLASSES else x.view(x.shape)
    return x if 1 in x.stride()[-2:] else x.contiguous()
