"""Products of values in bf16 with fp32 scales, on a CPU with AVX512-BF16: `train/precision/scaled_products.cpp`.

An operand (O, C) is `Quantized` with its values in bf16, or a tensor in bf16, whose scales are all one. A scale stands
for tiles of 128 along the contraction, or for all of it.

Shape suffixes: as in train/precision/products.py.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import record_function

from train.native.build import Source, load
from train.precision.formats import TILE
from train.precision.groups import Groups
from train.precision.quantize import Quantized

SOURCE = Source(
    Path(__file__).with_name("scaled_products.cpp"),
    "precision.fp8.compiled",
    "precision.fp8.compiled=false: torch's operations, slower",
    ("-fno-strict-aliasing",),
    (Path(__file__).parents[1] / "native" / "tiles.h",),
)
"""Without strict aliasing, since neighbours in bf16 are read as one word."""
Operand = Tensor | Quantized
Part = tuple[int, int, int, int, int, int]
"""One product: first row on the left, rows, matrix on the right, first and last of the contraction, offset of its output."""


def product(left_OC: Operand, right_NC: Operand, dtype: torch.dtype) -> Tensor:
    """left right^T: (O, N)."""
    (rows, contraction), columns = left_OC.shape, right_NC.shape[0]
    out_ON = _values(left_OC).new_empty(rows, columns, dtype=dtype)
    _run("scaled_gemm", left_OC, right_NC, out_ON, [(0, rows, 0, 0, contraction, 0)])
    return out_ON


def grouped(left_PC: Operand, right_ENC: Operand, groups: Groups, dtype: torch.dtype) -> Tensor:
    """Each expert's rows times its own matrix: (P, N), zero in the padding."""
    _, columns, contraction = right_ENC.shape
    out_PN = _values(left_PC).new_zeros(groups.rows, columns, dtype=dtype)
    experts = enumerate(zip(groups.starts, groups.counts, strict=True))
    parts = [(start, rows, e, 0, contraction, start * columns) for e, (start, rows) in experts]
    _run("grouped_scaled_gemm", left_PC, right_ENC, out_PN, parts)
    return out_PN


def grouped_wgrad(left_OP: Operand, right_NP: Operand, groups: Groups, dtype: torch.dtype) -> Tensor:
    """For each expert the sum over its rows: (E, O, N)."""
    rows, columns = left_OP.shape[0], right_NP.shape[0]
    out_EON = _values(left_OP).new_empty(len(groups.counts), rows, columns, dtype=dtype)
    experts = enumerate(zip(groups.starts, groups.counts, strict=True))
    parts = [(0, rows, 0, start, start + count, e * rows * columns) for e, (start, count) in experts]
    _run("grouped_scaled_gemm", left_OP, right_NP, out_EON, parts)
    return out_EON


@cache
def load_products() -> ctypes.CDLL:
    """The library. Raises UserError where it cannot be built, kept or loaded."""
    library = load(SOURCE)
    library.scaled_products.argtypes = [ctypes.POINTER(_Problem), c_void_p, c_int64, c_int64]
    library.scaled_products.restype = None
    return library


def _run(name: str, left: Operand, right: Operand, out: Tensor, parts: Sequence[Part]) -> None:
    """name: for torch's profiler, which sees nothing of compiled code by itself."""
    left, right = _readable(left), _readable(right)
    if out.is_meta:
        return  # plans want to know what is allocated only
    columns = out.shape[-1]
    problem = _Problem(_operand(left), _operand(right), out.data_ptr(), columns, columns, out.dtype == torch.float32)
    numbers = [number for part in parts for number in part]
    table = (c_int64 * len(numbers))(*numbers)
    with record_function(name):
        load_products().scaled_products(ctypes.byref(problem), table, len(parts), torch.get_num_threads())


def _values(x: Operand) -> Tensor:
    return x.q if isinstance(x, Quantized) else x


def _readable(x: Operand) -> Operand:
    """The same, side by side in memory along the last axis or the one before."""
    if isinstance(x, Quantized):
        return Quantized(_readable(x.q), x.scale, x.cast, x.shape)
    return x if 1 in x.stride()[-2:] else x.contiguous()


class _Operand(ctypes.Structure):
    """`Operand` of scaled_products.cpp."""

    _fields_ = [
        ("data", c_void_p), ("matrix", c_int64), ("outer", c_int64), ("inner", c_int64),
        ("scale", c_void_p), ("scale_matrix", c_int64), ("scale_outer", c_int64), ("scale_tile", c_int64), ("shift", c_int64),
    ]  # fmt: skip


class _Problem(ctypes.Structure):
    """`Problem` of scaled_products.cpp."""

    _fields_ = [
        ("left", _Operand), ("right", _Operand), ("out", c_void_p),
        ("columns", c_int64), ("out_stride", c_int64), ("fp32", c_int64),
    ]  # fmt: skip


def _operand(x: Operand) -> _Operand:
    values = _values(x)
    assert values.dtype == torch.bfloat16
    memory = values.data_ptr(), *_strides(values)
    if isinstance(x, Tensor):
        return _Operand(*memory, None, 0, 0, 0, 0)
    matrix, outer, tile = _strides(x.scale)
    one_tile, one_outer = x.scale.shape[-1] <= 1, x.scale.shape[-2] <= 1
    side, along = x.cast.block
    assert (one_tile or along == TILE) and (one_outer or side in (1, TILE))
    shift = TILE.bit_length() - 1 if side > 1 else 0
    return _Operand(*memory, x.scale.data_ptr(), matrix, 0 if one_outer else outer, 0 if one_tile else tile, shift)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of matrices, rows and columns."""
    return (0, *x.stride()) if x.dim() == 2 else x.stride()
