"""Computes the casts of the CPU emulation in compiled code: `train/kernels/fp8/casts.cpp`."""

from ctypes import c_float, c_int32, c_int64
from functools import cache, partial
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from train.kernels.cpu.cpp_build import CppSource, load_library
from train.kernels.cpu.cpp_function import Array, Kernel, Number, Size, Struct, Threads
from train.kernels.fp8.formats import E4M3, Cast
from train.kernels.fp8.quantize import EagerCasts, QuantizedTensor, fitted

CASTS_SOURCE = CppSource(
    Path(__file__).with_name("casts.cpp"),
    "precision.fp8.compiled",
    "precision.fp8.compiled=false: torch's operations, slower",
    ("-ffp-contract=off",),
)
"""The C++ source of the casts, which round products before adding."""


def _matrices(of: str, out: bool = False) -> Struct:
    """Declares the struct `Matrices` of casts.cpp: values or codes, and scales."""
    what = {"out": out, "optional": True}
    parts = {
        "values": Array((torch.bfloat16, torch.float32), "*M R C", **what),
        "fp32": Size(f"{of}_values_dtype"),
        "codes": Array((torch.float8_e4m3fn, torch.float8_e5m2), "*M R C", **what),
        "packed": Array(torch.uint8, "*M R 3*-(-C//2)", **what),
        "scale": Array(torch.float32, f"*M -(-R//{of}_block_rows) -(-C//{of}_block_columns)", **what),
        "block_rows": Number(c_int64),
        "block_columns": Number(c_int64),
        "mantissa": Number(c_int32),
        "min_exponent": Number(c_int32),
        "width": Number(c_int32),
        "max": Number(c_float),
    }
    return Struct(**{f"{of}_{name}": part for name, part in parts.items()})


_load = partial(load_library, CASTS_SOURCE)
_SIZES = {"matrices": Size("M"), "rows": Size("R"), "columns": Size("C")}
_cast_matrices = Kernel(
    _load, "cast_matrices", source=_matrices("in"), out=_matrices("out", out=True),
    **_SIZES, floor=Number(c_float), pow2=Number(c_int32), threads=Threads(c_int32),
)  # fmt: skip
_decode_matrices = Kernel(
    _load, "decode_matrices", source=_matrices("in"), out=_matrices("out", out=True),
    **_SIZES, threads=Threads(c_int32),
)  # fmt: skip


class CompiledCasts(EagerCasts):
    """Casts in compiled code, with the same bits as `EagerCasts` except for the sign of zeros.

    The casts accept CPU tensors, and meta tensors for mode=plan. `split` returns a `QuantizedTensor` whose `q` is bf16,
    which holds the values of every format exactly.
    """

    def quantize(self, x_MK: Tensor, cast: Cast) -> QuantizedTensor:
        cast = fitted(cast, x_MK)
        if cast.format.dtype is None:
            q = x_MK.new_empty(*x_MK.shape[:-1], 3 * -(-x_MK.shape[-1] // 2), dtype=torch.uint8)
        else:
            q = x_MK.new_empty(x_MK.shape, dtype=cast.format.dtype)
        return self._quantize(x_MK, q, cast)

    def split(self, x: Tensor | QuantizedTensor, cast: Cast) -> QuantizedTensor:
        """Quantise like `quantize`, but with bf16 values in `q`."""
        q = (x.q if isinstance(x, QuantizedTensor) else x).new_empty(x.shape, dtype=torch.bfloat16)
        return self._quantize(x, q, fitted(cast, x))

    def decoded(self, x: QuantizedTensor) -> QuantizedTensor:
        """Returns the same operand with bf16 values in `q`."""
        if x.q.dtype == torch.bfloat16:
            return x
        codes = _contiguous(x)
        q = codes.q.new_empty(x.shape, dtype=torch.bfloat16)
        _decode_matrices(*_memory(codes.q, None, x.cast), *_memory(q, None, x.cast))
        return QuantizedTensor(q, codes.scale, x.cast, x.shape)

    def fake_quantize(self, x: Tensor | QuantizedTensor, cast: Cast, dtype: torch.dtype) -> Tensor:
        assert dtype in (torch.bfloat16, torch.float32)
        cast = fitted(cast, x)
        values = (x.q if isinstance(x, QuantizedTensor) else x).new_empty(x.shape, dtype=dtype)
        _cast(x, values, None, cast)
        return values

    def dequantize(self, x: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        assert dtype in (torch.bfloat16, torch.float32)
        x = _contiguous(x)
        values = x.q.new_empty(x.shape, dtype=dtype)
        _decode_matrices(*_memory(x.q, x.scale, x.cast), *_memory(values, None, x.cast))
        return values

    def _quantize(self, x: Tensor | QuantizedTensor, q: Tensor, cast: Cast) -> QuantizedTensor:
        """Quantise x, and write codes or values to q. The dtype of q decides which."""
        blocks = [-(-size // side) for size, side in zip(x.shape[-2:], cast.block, strict=True)]
        scale = q.new_empty(*x.shape[:-2], *blocks, dtype=torch.float32)
        _cast(x, q, scale, cast)
        return QuantizedTensor(q, scale, cast, x.shape)


@cache
def load_casts() -> CompiledCasts:
    """Returns the compiled casts. Raises UserError if they cannot be loaded."""
    load_library(CASTS_SOURCE)
    return CompiledCasts()


def _cast(x: Tensor | QuantizedTensor, q: Tensor, scale: Tensor | None, cast: Cast) -> None:
    """Cast x, and write the result to q and scale. If scale is None, q gets the dequantised values."""
    x = _contiguous(x)
    source = (x.q, x.scale, x.cast) if isinstance(x, QuantizedTensor) else (x, None, Cast(E4M3, (1, 1), False))
    _cast_matrices(*_memory(*source), *_memory(q, scale, cast), cast.floor, cast.pow2)


def _memory(x: Tensor, scale: Tensor | None, cast: Cast) -> tuple:
    """Returns the arguments for the struct that `_matrices` declares."""
    format = cast.format
    if x.dtype in (torch.bfloat16, torch.float32):
        memory = x, None, None
    else:
        assert x.dtype == (format.dtype or torch.uint8), (x.dtype, format)
        memory = (None, None, x) if format.dtype is None else (None, x, None)
    width = 12 if format.dtype is None else 8
    return *memory, scale, *cast.block, format.mantissa, format.min_exponent, width, format.max


@overload
def _contiguous(x: Tensor) -> Tensor: ...


@overload
def _contiguous(x: QuantizedTensor) -> QuantizedTensor: ...


def _contiguous(x: Tensor | QuantizedTensor) -> Tensor | QuantizedTensor:
    """Returns the tensor in row-major order. A plain tensor becomes fp32, unless it is bf16."""
    if isinstance(x, QuantizedTensor):
        return QuantizedTensor(x.q.contiguous(), x.scale.contiguous(), x.cast, x.shape)
    return x.contiguous() if x.dtype in (torch.bfloat16, torch.float32) else x.float().contiguous()
