"""Block-scaled quantisation: the plain reference, also used by the CPU emulation.

A tensor (..., M, K) is cut into blocks of (rows, columns). Each block is divided by one scale and cast (paper 3.3.2).
Activations and gradients have tiles of 128 along the contraction, weights have blocks of 128x128.

    amax    = max(max |x|, 1e-4)
    scale   = amax / max of the format           rounded up to a power of two for UE8M0 scales
    inverse = max of the format / amax           1 / scale for UE8M0
    q       = cast(clamp(x * inverse, -max, max))     and x is about q * scale

All arithmetic is fp32 with IEEE division and one rounding to the format, to nearest with ties to even. So the CPU and
the Triton kernels agree in every bit of q and scale. Incomplete blocks at the edges are padded with zeros, which do not
change amax.

`quantize` implements exactly this with torch operations; all other implementations are tested against it. The CPU
emulation uses compiled code (train/kernels/fp8/compiled_casts.py) if the CPU has AVX2.

Shape suffixes: M rows, K columns, m and k blocks of rows and columns.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from train.kernels.fp8.formats import Cast, ScaleBlock, pack_e5m6, round_to, unpack_e5m6


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantised tensor; x is about q * scale, with scale repeated over its block."""

    q: Tensor
    """Codes (..., M, K) in the format's dtype; for E5M6 (..., M, 3 ceil(K / 2)) uint8."""
    scale: Tensor
    """Scales (..., ceil(M / rows), ceil(K / columns)), fp32."""
    cast: Cast
    """The cast that produced q and scale. The cast's block is no larger than the tensor."""
    shape: torch.Size
    """Shape of the tensor, (..., M, K), without the padding that q and scale may have on CUDA."""


def scales(amax: Tensor, cast: Cast) -> tuple[Tensor, Tensor]:
    """Scale and inverse, in fp32, of blocks with this max-abs. NaN where amax is NaN."""
    amax = amax.float().clamp_min(cast.floor)
    maximum = torch.full_like(
        amax, cast.format.max
    )  # torch divides by a Python number as a multiplication by its reciprocal
    scale = amax / maximum
    if not cast.pow2:
        return scale, maximum / amax
    rounded = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    scale = torch.where(scale.isnan(), scale, rounded)
    return scale, scale.reciprocal()


class ShapedTensor(Protocol):
    """An object with the shape of a tensor."""

    @property
    def shape(self) -> torch.Size: ...


def fitted(cast: Cast, x_MK: ShapedTensor) -> Cast:
    """Returns the cast with its block no larger than the tensor."""
    block = min(cast.block[0], max(x_MK.shape[-2], 1)), min(cast.block[1], max(x_MK.shape[-1], 1))
    return cast if block == cast.block else replace(cast, block=block)


def blocked(x_MK: Tensor, block: ScaleBlock) -> Tensor:
    """Splits x into blocks: (..., M, K) -> (..., m, rows, k, columns). Incomplete blocks at the edges are padded with
    zeros."""
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


def quantize(x_MK: Tensor, cast: Cast) -> QuantizedTensor:
    """Quantise (..., M, K)."""
    cast = fitted(cast, x_MK)
    blocks = blocked(x_MK.float(), cast.block)
    scale, inverse = scales(blocks.abs().amax((-3, -1), keepdim=True), cast)
    scaled = (blocks * inverse).clamp(-cast.format.max, cast.format.max)
    if cast.format.dtype is None:
        q = pack_e5m6(unblocked(round_to(scaled, cast.format), x_MK.shape))
    else:
        q = unblocked(scaled.to(cast.format.dtype), x_MK.shape)
    return QuantizedTensor(q, scale.squeeze((-3, -1)), cast, x_MK.shape)


def dequantize(x: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the values of a quantised tensor: (..., M, K)."""
    # fp16 represents every code exactly, and its product with an fp32 scale is rounded once to fp32. This also holds in
    # mode=prove, which widens fp32 to fp64.
    values = unpack_e5m6(x.q, x.shape[-1]) if x.cast.format.dtype is None else x.q.half()
    return unblocked((blocked(values, x.cast.block) * x.scale[..., :, None, :, None]).to(dtype), values.shape)


def exact_dtype(cast: Cast) -> torch.dtype:
    """Returns the smallest dtype that represents the quantised values exactly: bf16 for power-of-two scales, else
    fp32."""
    return torch.bfloat16 if cast.pow2 else torch.float32


class EagerCasts:
    """Casts for the CPU emulation in torch operations; train/kernels/fp8/compiled_casts.py has the compiled casts."""

    def quantize(self, x_MK: Tensor, cast: Cast) -> QuantizedTensor:
        """Codes and scales."""
        return quantize(x_MK, cast)

    def fake_quantize(self, x: Tensor | QuantizedTensor, cast: Cast, dtype: torch.dtype) -> Tensor:
        """The values after the cast, in dtype."""
        return dequantize(quantize(dequantize(x) if isinstance(x, QuantizedTensor) else x, cast), dtype)

    def dequantize(self, x: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        """The values of the codes, in dtype."""
        return dequantize(x, dtype)
