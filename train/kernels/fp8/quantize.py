"""Block-scaled quantisation: the plain reference, and the path that the CPU emulation takes.

A tensor (..., M, K) is cut into blocks of (rows, columns); each block is divided by one scale and cast (paper
3.3.2): activations and gradients in tiles of 128 along the contraction, weights in 128x128.

    amax    = max(max |x|, 1e-4)
    scale   = amax / max of the format           rounded up to a power of two for UE8M0 scales
    inverse = max of the format / amax           1 / scale for UE8M0
    q       = cast(clamp(x * inverse, -max, max))     and x is about q * scale

All of it is fp32 with IEEE division and one rounding to the format, to nearest with ties to even, so that the CPU
and the Triton kernels agree in every bit of q and scale.  Ragged edges are padded with zeros, which changes no amax.

`quantize_reference` is that, word for word.  `quantize`, `fake_quantize` and `dequantize` give the same values
(signed zeros aside) two to six times faster in eager mode:
  - the amax of bf16 is an integer maximum, since the order of positive floats is that of their bits;
  - a value is rounded where it stands by adding and subtracting 1.5 * 2**k (see `formats.round_to`), without a
    detour through 8-bit storage, whose conversion back is the slow part on CPU;
  - E4M3 and E5M2 are decoded as shifted fp16 bits.
With power-of-two scales the dequantised value has at most 7 significant bits, so it is exact in bf16.

Shape suffixes: M rows, K columns, m and k blocks of rows and columns.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from train.kernels.fp8.formats import E4M3, Cast, Format, ScaleBlock, pack_e5m6, round_to, unpack_e5m6


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantised tensor; x is about q * scale, scale repeated over its block."""

    q: Tensor
    """(..., M, K) in the format's dtype; E5M6: (..., M, 3 ceil(K / 2)) uint8."""
    scale: Tensor
    """(..., ceil(M / rows), ceil(K / columns)) fp32."""
    cast: Cast
    """How it was made; the block no larger than the tensor."""
    shape: torch.Size
    """(..., M, K), without the padding that q and scale may have on CUDA."""


def scales(amax: Tensor, cast: Cast) -> tuple[Tensor, Tensor]:
    """(scale, inverse) in fp32 of blocks with this max-abs. Not a number where amax is not."""
    amax = amax.float().clamp_min(cast.floor)
    maximum = torch.full_like(amax, cast.format.max)  # a number in its place would be divided by as a reciprocal
    scale = amax / maximum
    if not cast.pow2:
        return scale, maximum / amax
    rounded = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    scale = torch.where(scale.isnan(), scale, rounded)
    return scale, scale.reciprocal()


class ShapedTensor(Protocol):
    """A tensor, in whatever form."""

    @property
    def shape(self) -> torch.Size: ...


def fitted(cast: Cast, x_MK: ShapedTensor) -> Cast:
    """The cast with its block no larger than the tensor."""
    block = min(cast.block[0], max(x_MK.shape[-2], 1)), min(cast.block[1], max(x_MK.shape[-1], 1))
    return cast if block == cast.block else replace(cast, block=block)


def blocked(x_MK: Tensor, block: ScaleBlock) -> Tensor:
    """(..., M, K) -> (..., m, rows, k, columns), zero-padded at ragged edges."""
    rows, columns = block
    below, right = -x_MK.shape[-2] % rows, -x_MK.shape[-1] % columns
    if below or right:
        x_MK = torch.nn.functional.pad(x_MK, (0, right, 0, below))
    lead, (height, width) = x_MK.shape[:-2], x_MK.shape[-2:]
    return x_MK.reshape(*lead, height // rows, rows, width // columns, columns)


def unblocked(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of `blocked`: crop to (..., M, K) = shape, contiguous."""
    whole = blocks.flatten(-4, -3).flatten(-2, -1)
    return whole if whole.shape == shape else whole[..., : shape[-2], : shape[-1]].contiguous()


def quantize_reference(x_MK: Tensor, cast: Cast) -> QuantizedTensor:
    """Plain quantisation of (..., M, K): the definition that every other path is tested against."""
    cast = fitted(cast, x_MK)
    blocks = blocked(x_MK.float(), cast.block)
    scale, inverse = scales(blocks.abs().amax((-3, -1), keepdim=True), cast)
    scaled = (blocks * inverse).clamp(-cast.format.max, cast.format.max)
    if cast.format.dtype is None:
        q = pack_e5m6(unblocked(round_to(scaled, cast.format), x_MK.shape))
    else:
        q = unblocked(scaled.to(cast.format.dtype), x_MK.shape)
    return QuantizedTensor(q, scale.squeeze((-3, -1)), cast, x_MK.shape)


def dequantize_reference(x: QuantizedTensor) -> Tensor:
    """(..., M, K) fp32."""
    values = unpack_e5m6(x.q, x.shape[-1]).float() if x.cast.format.dtype is None else x.q.float()
    return unblocked(blocked(values, x.cast.block) * x.scale[..., :, None, :, None], values.shape)


def quantize(x_MK: Tensor, cast: Cast) -> QuantizedTensor:
    """`quantize_reference`, faster; same bits."""
    if cast.format.dtype is None:
        return quantize_reference(x_MK, cast)
    cast = fitted(cast, x_MK)
    blocks = blocked(x_MK, cast.block)
    scale, inverse = scales(_amax(blocks), cast)
    if x_MK.dtype == torch.bfloat16 and cast.pow2:
        inverse = inverse.bfloat16()  # exact, and the product with a power of two is exact too
    # no clamp: amax * inverse exceeds the maximum by at most one rounding of fp32, which casts to the maximum
    q = unblocked((blocks * inverse).to(cast.format.dtype), x_MK.shape)
    return QuantizedTensor(q, scale.squeeze((-3, -1)), cast, x_MK.shape)


def exact_dtype(cast: Cast) -> torch.dtype:
    """The smallest format that holds the quantised values exactly: bf16 for power-of-two scales, else fp32."""
    return torch.bfloat16 if cast.pow2 else torch.float32


def fake_quantize(x_MK: Tensor, cast: Cast, dtype: torch.dtype | None = None) -> Tensor:
    """Quantise (..., M, K) and dequantise, in `exact_dtype` or as asked."""
    blocks, dtype = blocked(x_MK, fitted(cast, x_MK).block), dtype or exact_dtype(cast)
    if cast.pow2 and x_MK.dtype == torch.bfloat16 and cast.format.mantissa <= 3:
        return unblocked(_fake_bf16(blocks, cast).to(dtype), x_MK.shape)
    scale, inverse = scales(_amax(blocks), cast)
    return unblocked(round_to(blocks * inverse, cast.format).mul_(scale).to(dtype), x_MK.shape)


def dequantize(x: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """(..., M, K) in `exact_dtype` or as asked."""
    values, factor = _as_fp16(x)
    scaled = blocked(values, x.cast.block) * (x.scale * factor)[..., :, None, :, None]
    return unblocked(scaled.to(dtype or exact_dtype(x.cast)), values.shape)


class EagerCasts:
    """What the CPU emulation asks for, in torch's own operations; train/kernels/fp8/compiled_casts.py has the same compiled."""

    def quantize(self, x_MK: Tensor, cast: Cast) -> QuantizedTensor:
        return quantize(x_MK, cast)

    def fake_quantize(self, x: Tensor | QuantizedTensor, cast: Cast, dtype: torch.dtype) -> Tensor:
        return fake_quantize(dequantize(x) if isinstance(x, QuantizedTensor) else x, cast, dtype)

    def dequantize(self, x: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        return dequantize(x, dtype)


def _as_fp16(x: QuantizedTensor) -> tuple[Tensor, float]:
    """Values as fp16 of the same bit fields, and the power of two that is missing from them."""
    if x.cast.format.dtype is None:
        return unpack_e5m6(x.q, x.shape[-1]), 1.0
    bits = x.q.view(torch.int8).short()
    if x.cast.format is E4M3:  # the sign bit was copied to bit 14 too; exponent bias 7 beside 15
        return bits.bitwise_left_shift_(7).bitwise_and_(-0x4080).view(torch.float16), 256.0
    return bits.bitwise_left_shift_(8).view(torch.float16), 1.0


def _amax(blocks: Tensor) -> Tensor:
    """Max-abs of every block, kept as size-1 dimensions."""
    if blocks.dtype != torch.bfloat16:
        return blocks.abs().amax((-3, -1), keepdim=True)
    magnitude = blocks.view(torch.int16) & 0x7FFF
    return magnitude.amax((-3, -1), keepdim=True).view(torch.bfloat16)


def _fake_bf16(blocks: Tensor, cast: Cast) -> Tensor:
    """Round bf16 blocks on the grid of their own power-of-two scale, without leaving bf16.

    Values from 2^122 up, infinities too, are rounded in some other way: their shift has no exponent in bf16.
    """
    carry, exponent, floor, half = _bf16_constants(cast.format, cast.floor)
    shift = blocks.view(torch.int16) & 0x7FFF
    smallest = shift.amax((-3, -1), keepdim=True)  # bits of amax, then of the smallest normal value of the block
    smallest.add_(carry).bitwise_and_(0x7F80).sub_(exponent).clamp_min_(floor)
    shift &= 0x7F80
    torch.maximum(shift, smallest, out=shift)
    shift += half
    return (blocks + shift.view(torch.bfloat16)).sub_(shift.view(torch.bfloat16))


@cache
def _bf16_constants(format: Format, floor: float) -> tuple[int, int, int, int]:
    """Bits of bf16 numbers for `_fake_bf16`.

    The scale's exponent is that of amax less that of the maximum, plus 1 where amax has the larger mantissa.
    carry: what the mantissa of the maximum lacks; added to amax it carries into the exponent just then.
    exponent: from there to the smallest normal value of the block. floor: that value for the smallest amax allowed.
    half: from the exponent of a value to 1.5 * 2**k with a step in its last place, see `formats.round_to`.
    """
    maximum = int(torch.tensor(format.max, dtype=torch.bfloat16).view(torch.int16))
    scale, _ = scales(torch.tensor(floor), Cast(format, (1, 1), True, floor))
    smallest = (scale * 2.0**format.min_exponent).bfloat16().view(torch.int16)
    exponent = ((maximum >> 7) - 127 - format.min_exponent) << 7
    return 0x7F - (maximum & 0x7F), exponent, int(smallest), ((7 - format.mantissa) << 7) + 0x40
