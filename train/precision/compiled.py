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
    "precision.fp8.compiled=false: torch's operations, slower",
    ("-ffp-contract=off",),
)
"""Without contraction, so that a product is rounded before it is added to, as in the reference."""


class CompiledCasts:
    """`train.precision.quantize.EagerCasts` compiled: the same bits, signed zeros aside. CPU tensors only, or, without a
    library, meta tensors, for plans: the same is allocated then.

    A `Quantized` may also hold the values of its codes in bf16, which holds every format here exactly (`split`).
    """

    def __init__(self, library: ctypes.CDLL | None):
        self._library = library

    def quantize(self, x_MK: Tensor, cast: Cast) -> Quantized:
        """See `train.precision.quantize.quantize`."""
        cast = fitted(cast, x_MK)
        if cast.format.dtype is None:
            q = x_MK.new_empty(*x_MK.shape[:-1], 3 * -(-x_MK.shape[-1] // 2), dtype=torch.uint8)
        else:
            q = x_MK.new_empty(x_MK.shape, dtype=cast.format.dtype)
        return self._quantize(x_MK, q, cast)

    def split(self, x: Tensor | Quantized, cast: Cast) -> Quantized:
        """`quantize` with values in bf16 in place of codes."""
        q = (x.q if isinstance(x, Quantized) else x).new_empty(x.shape, dtype=torch.bfloat16)
        return self._quantize(x, q, fitted(cast, x))

    def decoded(self, x: Quantized) -> Quantized:
        """The same with values in bf16 in place of codes."""
        if x.q.dtype == torch.bfloat16:
            return x
        codes = _contiguous(x)
        q = codes.q.new_empty(x.shape, dtype=torch.bfloat16)
        self._decode(codes, _memory(codes.q, None, x.cast), q)
        return Quantized(q, codes.scale, x.cast, x.shape)

    def fake_quantize(self, x: Tensor | Quantized, cast: Cast, dtype: torch.dtype) -> Tensor:
        """See `train.precision.quantize.fake_quantize`."""
        assert dtype in (torch.bfloat16, torch.float32)
        cast = fitted(cast, x)
        values = (x.q if isinstance(x, Quantized) else x).new_empty(x.shape, dtype=dtype)
        self._cast(x, _memory(values, None, cast), cast)
        return values

    def dequantize(self, x: Quantized, dtype: torch.dtype) -> Tensor:
        """See `train.precision.quantize.dequantize`."""
        assert dtype in (torch.bfloat16, torch.float32)
        x = _contiguous(x)
        values = x.q.new_empty(x.shape, dtype=dtype)
        self._decode(x, _memory(x.q, x.scale, x.cast), values)
        return values

    def _quantize(self, x: Tensor | Quantized, q: Tensor, cast: Cast) -> Quantized:
        """Into q, codes or values."""
        blocks = [-(-size // side) for size, side in zip(x.shape[-2:], cast.block, strict=True)]
        scale = q.new_empty(*x.shape[:-2], *blocks, dtype=torch.float32)
        self._cast(x, _memory(q, scale, cast), cast)
        return Quantized(q, scale, cast, x.shape)

    def _cast(self, x: Tensor | Quantized, out: "_Matrices", cast: Cast) -> None:
        x = _contiguous(x)  # alive while it is read
        plain = Cast(E4M3, (1, 1), False)
        source = _memory(x.q, x.scale, x.cast) if isinstance(x, Quantized) else _memory(x, None, plain)
        if self._library is not None:
            threads = torch.get_num_threads()
            self._library.cast_matrices(source, out, *_sizes(x.shape), cast.floor, cast.pow2, threads)

    def _decode(self, x: Quantized, source: "_Matrices", values: Tensor) -> None:
        if self._library is not None:
            out = _memory(values, None, x.cast)
            self._library.decode_matrices(source, out, *_sizes(x.shape), torch.get_num_threads())


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


def _memory(x: Tensor, scale: Tensor | None, cast: Cast) -> _Matrices:
    """Values or codes, and their scales where they count."""
    values = x.dtype in (torch.bfloat16, torch.float32)
    address = x.data_ptr()
    return _Matrices(
        address if values else None, x.dtype == torch.float32, None if values else address,
        None if scale is None else scale.data_ptr(), *cast.block, _Format.of(cast.format),
    )  # fmt: skip


def _contiguous(x: Tensor | Quantized) -> Tensor | Quantized:
    """The same row by row in memory, values in bf16 or fp32."""
    if isinstance(x, Quantized):
        return Quantized(x.q.contiguous(), x.scale.contiguous(), x.cast, x.shape)
    return x.contiguous() if x.dtype in (torch.bfloat16, torch.float32) else x.float().contiguous()


def _sizes(shape: torch.Size) -> tuple[int, int, int]:
    """Matrices, rows and columns."""
    return shape[:-2].numel(), shape[-2], shape[-1]
