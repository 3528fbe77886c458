"""The casts of the CPU emulation as compiled code: `train/precision/casts.cpp`."""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from train.native.build import Source, load
from train.precision.formats import E4M3, Cast, Format
from train.precision.quantize import Quantized, fitted

SOURCE = Source(
    Path(__file__).with_name("casts.cpp"),
    "precision.fp8.compiled",
    "precision.fp8.compiled=false: the same bits, but slower",
    ("-ffp-contract=off",),
)
"""Without contraction, so that a product is rounded before it is added to, as in the reference."""


class CompiledCasts:
    """`train.precision.quantize.EagerCasts` compiled: the same bits, signed zeros aside. CPU tensors only."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library

    def quantize(self, x_MK: Tensor, cast: Cast) -> Quantized:
        """See `train.precision.quantize.quantize`."""
        cast, shape = fitted(cast, x_MK), x_MK.shape
        if cast.format.dtype is None:
            q = torch.empty(*shape[:-1], 3 * -(-shape[-1] // 2), dtype=torch.uint8)
        else:
            q = torch.empty(shape, dtype=cast.format.dtype)
        blocks = [-(-size // side) for size, side in zip(shape[-2:], cast.block, strict=True)]
        quantized = Quantized(q, torch.empty(*shape[:-2], *blocks), cast, shape)
        self._cast(x_MK, _codes(quantized), cast)
        return quantized

    def fake_quantize(self, x: Tensor | Quantized, cast: Cast, dtype: torch.dtype) -> Tensor:
        """See `train.precision.quantize.fake_quantize`."""
        assert dtype in (torch.bfloat16, torch.float32)
        cast, values = fitted(cast, x), torch.empty(x.shape, dtype=dtype)
        self._cast(x, _values(values, cast), cast)
        return values

    def dequantize(self, x: Quantized, dtype: torch.dtype) -> Tensor:
        """See `train.precision.quantize.dequantize`."""
        assert dtype in (torch.bfloat16, torch.float32)
        values = torch.empty(x.shape, dtype=dtype)
        x = _contiguous(x)
        self._library.decode_matrices(_codes(x), _values(values, x.cast), *_sizes(x.shape), torch.get_num_threads())
        return values

    def _cast(self, x: Tensor | Quantized, out: "_Matrices", cast: Cast) -> None:
        x = _contiguous(x)  # alive while it is read
        source = _codes(x) if isinstance(x, Quantized) else _values(x, Cast(E4M3, (1, 1), False))
        threads = torch.get_num_threads()
        self._library.cast_matrices(source, out, *_sizes(x.shape), cast.floor, cast.pow2, threads)


@cache
def load_casts() -> CompiledCasts:
    """The compiled casts. Raises UserError where they cannot be built, kept or loaded."""
    library = load(SOURCE)
    sizes = [c_int64, c_int64, c_int64]
    matrices = [ctypes.POINTER(_Matrices)] * 2
    library.cast_matrices.argtypes = [*matrices, *sizes, c_float, c_int32, c_int32]
    library.decode_matrices.argtypes = [*matrices, *sizes, c_int32]
    library.cast_matrices.restype = library.decode_matrices.restype = None
    return CompiledCasts(library)


class _Format(ctypes.Structure):
    """`Format` of casts.cpp."""

    _fields_ = [("mantissa", c_int32), ("min_exponent", c_int32), ("width", c_int32), ("max", c_float)]

    @classmethod
    def of(cls, format: Format) -> "_Format":
        return cls(format.mantissa, format.min_exponent, 12 if format.dtype is None else 8, format.max)


class _Matrices(ctypes.Structure):
    """`Matrices` of casts.cpp: where values or codes lie in memory."""

    _fields_ = [
        ("values", c_void_p), ("fp32", c_int32), ("codes", c_void_p), ("scale", c_void_p),
        ("block_rows", c_int64), ("block_columns", c_int64), ("format", _Format),
    ]  # fmt: skip


def _values(x: Tensor, cast: Cast) -> _Matrices:
    return _Matrices(x.data_ptr(), x.dtype == torch.float32, None, None, *cast.block, _Format.of(cast.format))


def _codes(x: Quantized) -> _Matrices:
    return _Matrices(None, 0, x.q.data_ptr(), x.scale.data_ptr(), *x.cast.block, _Format.of(x.cast.format))


def _contiguous(x: Tensor | Quantized) -> Tensor | Quantized:
    """The same row by row in memory, values in bf16 or fp32."""
    if isinstance(x, Quantized):
        return Quantized(x.q.contiguous(), x.scale.contiguous(), x.cast, x.shape)
    return x.contiguous() if x.dtype in (torch.bfloat16, torch.float32) else x.float().contiguous()


def _sizes(shape: torch.Size) -> tuple[int, int, int]:
    """Matrices, rows and columns."""
    return shape[:-2].numel(), shape[-2], shape[-1]
