"""Number formats that are smaller than bf16, and the twelve-bit packing of E5M6.

A format with m mantissa bits has 1 + m significant bits down to 2**min_exponent. Below it, neighbouring values are
2**(min_exponent - m) apart. An E5M6 code is the top twelve bits of an fp16, and two codes share three bytes. Code i
begins at bit 12 i of the little-endian stream (reference: DeepSeek TileKernels).

Shape suffixes: K packed dimension.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.expert.wire import TILE

MX_TILE = 32
"""Number of values that share an MXFP8 scale (OCP Microscaling Formats, v1.0)."""
AMAX_FLOOR = 1e-4
"""Lower bound of the max-abs, so that every scale is positive (paper 3.3.2)."""


@dataclass(frozen=True)
class Format:
    """A floating-point format with four or five exponent bits."""

    name: str
    mantissa: int
    """Number of stored mantissa bits."""
    min_exponent: int
    """Exponent of the smallest normal value."""
    max: float
    """Largest finite value."""
    dtype: torch.dtype | None
    """torch's dtype of the codes; None if Sluice packs them."""


E4M3 = Format("e4m3", 3, -6, 448.0, torch.float8_e4m3fn)
E5M2 = Format("e5m2", 2, -14, 57344.0, torch.float8_e5m2)
E5M6 = Format("e5m6", 6, -14, 65024.0, None)

ScaleBlock = tuple[int, int]

WHOLE_SIDE = 2**62
"""A side length that makes a block cover the complete tensor."""


@dataclass(frozen=True)
class Cast:
    """How to quantise a tensor: format, block and kind of scale."""

    format: Format
    block: ScaleBlock
    """Rows and columns of a block, whose values share a scale. `fitted` limits the block to the tensor."""
    pow2: bool
    """Whether scales are rounded up to powers of two."""
    floor: float = AMAX_FLOOR
    """Lower bound of the max-abs from which a scale is computed."""

    def empty_tiles(self, like: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Allocates q (rows, columns), and a scale per row and 128 columns, stored column by column, on `like`'s
        device.
        """
        return like.new_empty(rows, columns, dtype=self.format.dtype), empty_scales(like, rows, columns // TILE)


def empty_scales(like: Tensor, outer: int, tiles: int) -> Tensor:
    """Allocates fp32 scales (outer, tiles), stored column by column."""
    return like.new_empty_strided((outer, tiles), (1, outer), dtype=torch.float32)


def round_to(x: Tensor, format: Format) -> Tensor:
    """Round fp32 values, |x| <= format.max, to the nearest value of the format, ties to even; in place.

    A step is the distance between the format's neighbouring values at x. After adding 1.5 * 2**23 steps, fp32 has no
    bits for fractions of a step. Subtracting them again is exact.
    """
    assert x.dtype == torch.float32
    shift = x.view(torch.int32) & 0x7F800000
    shift.clamp_min_((127 + format.min_exponent) << 23)
    shift += ((23 - format.mantissa) << 23) + 0x400000
    return x.add_(shift.view(torch.float32)).sub_(shift.view(torch.float32))


def pack_e5m6(x_K: Tensor) -> Tensor:
    """Pack values that E5M6 represents: (..., K) fp32 -> (..., 3 ceil(K / 2)) uint8."""
    x_K = torch.nn.functional.pad(x_K, (0, x_K.shape[-1] % 2)).half()  # exact: fp16 has E5M6's exponent range
    bits = (x_K.view(torch.int16).int() >> 4) & 0xFFF
    first, second = bits[..., 0::2], bits[..., 1::2]
    return torch.stack((first & 0xFF, first >> 8 | (second & 0xF) << 4, second >> 4), -1).flatten(-2).to(torch.uint8)


def unpack_e5m6(packed: Tensor, length: int) -> Tensor:
    """Unpack E5M6 values: (..., 3 ceil(K / 2)) uint8 -> (..., K) fp16. length: K."""
    first, middle, last = packed.unflatten(-1, (-1, 3)).short().unbind(-1)
    pairs = torch.stack((first | (middle & 0xF) << 8, middle >> 4 | last << 4), -1).flatten(-2)
    return (pairs << 4).view(torch.float16)[..., :length]
