"""The formats in which dispatch and combine send rows, as message rows of bytes.

    bf16    values in the activation dtype; an fp32 run sends fp32
    fp8     E4M3 values with one power-of-two scale per tile of 128 channels (paper 3.3.3)

FP8 row, in bytes:  D values | ceil(D/128) scale exponents (UE8M0: exponent + 127) | zeros to a multiple of 4.

With amax, the largest magnitude of a tile:

    scale = 2^ceil(log2(max(amax, floor) / 448)),    q = e4m3(x / scale)

The largest E4M3 number is 448 = 1.75 * 2^8. So the exponent of the scale is the exponent of amax minus 8, plus 1 if the
mantissa of amax exceeds 1.75. One integer addition to the bits of amax computes it exactly.

bf16 holds q * scale exactly. A second quantization may halve the scale and double q, but changes no value.

Shapes: R rows, D channels, B bytes per message row (a multiple of 4), S tiles of 128 channels.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from parallel.expert.permute import triton_dispatch

# Rows that arrived over an FP8 wire.
#
# Autograd treats a `QuantizedRows` like any tensor of the activation dtype. The experts of an FP8 recipe read its
# values and scales. A gather of such rows returns a `QuantizedRows`. Any other operation gets dequantized values.
#
# Shapes: R rows, D channels, S tiles of 128 channels.

TILE = 128
"""Number of consecutive values with one scale. In a weight, blocks of 128 x 128 have one scale (paper 3.3.2)."""
_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
"""The fp32 values of the 256 E4M3 bytes, in order."""
Widen = Callable[[Tensor], Tensor]
"""Converts FP8 values to fp32."""


def widen(q_RD: Tensor) -> Tensor:
    """Convert FP8 values to fp32. On a CPU, a lookup table is five times as fast as torch."""
    if q_RD.is_cuda:
        return q_RD.float()
    return _E4M3.to(q_RD.device).index_select(0, q_RD.view(torch.uint8).flatten().int()).view(q_RD.shape)


class QuantizedRows(Tensor):
    """Rows (R, D) as FP8 values with scales; bf16 represents each value times its scale exactly.

    q_RD: float8_e4m3fn; the rows may be strided
    scale_RS: fp32 powers of two
    floor: lower bound of a tile's amax for its scale
    dtype: dtype of the dequantized values
    widen: function that converts q_RD to fp32
    """

    @staticmethod
    def __new__(
        cls, q_RD: Tensor, scale_RS: Tensor, floor: float, dtype: torch.dtype, widen: Widen = widen
    ) -> "QuantizedRows":
        return Tensor._make_wrapper_subclass(cls, q_RD.shape, dtype=dtype, device=q_RD.device)

    def __init__(self, q_RD: Tensor, scale_RS: Tensor, floor: float, dtype: torch.dtype, widen: Widen = widen):
        self.q_RD, self.scale_RS, self.scale_floor, self.widen = q_RD, scale_RS, floor, widen

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyrefly: ignore[bad-override]  as torch documents it

    @classmethod
    # pyrefly: ignore[bad-override]  torch's stub forgets the function
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        rows = args[0]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return QuantizedRows(rows.q_RD, rows.scale_RS, rows.scale_floor, rows.dtype, rows.widen)
        if func is torch.ops.aten.index_select.default and args[1] == 0:
            return rows._gather(args[2])
        args, kwargs = tree_map_only(QuantizedRows, QuantizedRows.values, (args, kwargs or {}))
        return func(*args, **kwargs)

    def values(self) -> Tensor:
        """Return the dequantized rows as an ordinary tensor."""
        return dequantize(self.q_RD, self.scale_RS, self.dtype, self.widen)

    def _gather(self, index_X: Tensor) -> "QuantizedRows":
        q_XD = self.q_RD.view(torch.uint8).index_select(0, index_X).view(self.q_RD.dtype)
        return QuantizedRows(q_XD, self.scale_RS.index_select(0, index_X), self.scale_floor, self.dtype, self.widen)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"QuantizedRows(q_RD={self.q_RD!r}, scale_RS={self.scale_RS!r})"


def dequantize(q_RD: Tensor, scale_RS: Tensor, dtype: torch.dtype, widen: Widen = widen) -> Tensor:
    """Return q_RD times the scales of its tiles, in `dtype`."""
    return in_tiles(widen(q_RD)).mul_(scale_RS[..., None]).flatten(1)[:, : q_RD.shape[1]].to(dtype)


def in_tiles(x_RD: Tensor) -> Tensor:
    """Return rows as zero-padded tiles, (R, S, 128)."""
    width = x_RD.shape[1]
    if width % TILE:
        x_RD = torch.nn.functional.pad(x_RD, (0, -width % TILE))
    return x_RD.unflatten(1, (-(-width // TILE), TILE))


E4M3_MAX = 448.0
ACTIVATION_FLOOR, GRADIENT_FLOOR = 1e-4, 1e-12
"""Lower bounds of a tile's amax (largest magnitude). All values of a gradient may be far below 1e-4."""


class Wire(Protocol):
    """The interface of a wire that dispatchers use."""

    def row_bytes(self, width: int, dtype: torch.dtype) -> int:
        """Return the bytes of a row with `width` channels, a multiple of 4."""

    def encode(self, x_RD: Tensor, *, gradient: bool = False) -> Tensor:
        """Encode rows as bytes, uint8 (R, B).

        gradient: whether the rows are gradients, whose amax has a smaller lower bound.
        """

    def decode(self, bytes_RB: Tensor, width: int, dtype: torch.dtype, *, gradient: bool = False) -> Tensor:
        """Decode to rows (R, width) of `dtype`. gradient: as in `encode`."""


class HighWire:
    """The wire in the activation dtype. It copies rows only if their width or layout requires it."""

    def row_bytes(self, width: int, dtype: torch.dtype) -> int:
        return _round_up(width * dtype.itemsize, 4)

    def encode(self, x_RD: Tensor, *, gradient: bool = False) -> Tensor:
        bytes_RB = x_RD.contiguous().view(torch.uint8)
        missing = -bytes_RB.shape[1] % 4
        return F.pad(bytes_RB, (0, missing)) if missing else bytes_RB  # F.pad copies even if it adds nothing

    def decode(self, bytes_RB: Tensor, width: int, dtype: torch.dtype, *, gradient: bool = False) -> Tensor:
        rows_RB = bytes_RB[:, : width * dtype.itemsize]
        if bytes_RB.stride(0) % dtype.itemsize:  # fp64 rows next to an odd number of 4-byte words
            rows_RB = rows_RB.clone(memory_format=torch.contiguous_format)
        return rows_RB.view(dtype)


class Fp8Wire:
    """The wire of E4M3 values with one power-of-two scale per 1x128 tile (paper 3.3.2, 3.3.3).

    activation_floor, gradient_floor: lower bounds of a tile's amax.
    """

    def __init__(self, activation_floor: float = ACTIVATION_FLOOR, gradient_floor: float = GRADIENT_FLOOR):
        assert min(activation_floor, gradient_floor) >= 2.0**-110, "the scale's reciprocal must stay finite"
        self.activation_floor = activation_floor
        self.gradient_floor = gradient_floor
        self.widen: Widen = widen

    def row_bytes(self, width: int, dtype: torch.dtype) -> int:
        return _round_up(width + _tiles(width), 4)

    def encode(self, x_RD: Tensor, *, gradient: bool = False) -> Tensor:
        rows, width = x_RD.shape
        floor = self.gradient_floor if gradient else self.activation_floor
        if x_RD.is_cuda and width % TILE == 0:
            bytes_RB = torch.empty(rows, self.row_bytes(width, x_RD.dtype), dtype=torch.uint8, device=x_RD.device)
            triton_dispatch().encode_rows(x_RD, bytes_RB, floor)
            return bytes_RB
        tiles_RST = in_tiles(x_RD.float())
        amax_RS = tiles_RST.abs().amax(2).clamp_min(floor)
        exponent_RS = ((amax_RS.view(torch.int32) + 0x1FFFFF) >> 23) - 8
        inverse_RS = ((254 - exponent_RS) << 23).view(torch.float32)
        # The clamp only changes infinities, which the scale makes infinite again. A cast alone would not guarantee
        # this.
        q_RD = (tiles_RST * inverse_RS[..., None]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).flatten(1)
        bytes_RB = torch.zeros(rows, self.row_bytes(width, x_RD.dtype), dtype=torch.uint8, device=x_RD.device)
        bytes_RB[:, :width] = q_RD[:, :width].view(torch.uint8)
        bytes_RB[:, width : width + exponent_RS.shape[1]] = exponent_RS
        return bytes_RB

    def decode_parts(self, bytes_RB: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Split the bytes of rows into q_RD (float8_e4m3fn, a view) and scale_RS (fp32)."""
        q_RD = bytes_RB[:, :width].view(torch.float8_e4m3fn)
        exponent_RS = bytes_RB[:, width : width + _tiles(width)].to(torch.int32)
        return q_RD, (exponent_RS << 23).view(torch.float32)

    def decode(self, bytes_RB: Tensor, width: int, dtype: torch.dtype, *, gradient: bool = False) -> Tensor:
        return self.unpack(*self.decode_parts(bytes_RB, width), dtype, gradient=gradient)

    def unpack(self, q_RD: Tensor, scale_RS: Tensor, dtype: torch.dtype, *, gradient: bool) -> Tensor:
        """Decode rows from their FP8 values and scales."""
        return dequantize(q_RD, scale_RS, dtype, self.widen)


class Fp8RowsWire(Fp8Wire):
    """The FP8 wire for experts that compute in FP8: received rows are not decoded."""

    def unpack(self, q_RD: Tensor, scale_RS: Tensor, dtype: torch.dtype, *, gradient: bool) -> Tensor:
        floor = self.gradient_floor if gradient else self.activation_floor
        return QuantizedRows(q_RD, scale_RS, floor, dtype, self.widen)


def _tiles(width: int) -> int:
    return -(-width // TILE)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
