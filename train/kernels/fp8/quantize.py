"""Block-scaled quantisation: the plain reference, also used by the CPU emulation.

A tensor (..., M, K) is cut into blocks of (rows, columns). Each block is divided by one scale and cast (paper 3.3.2).

    amax    = max(max |x|, floor)                the floor is 1e-4 for activations and weights
    scale   = amax / max of the format           rounded up to a power of two for UE8M0 scales
    inverse = max of the format / amax           1 / scale for UE8M0
    q       = cast(clamp(x * inverse, -max, max))     and x is about q * scale

All arithmetic is fp32 with IEEE division. Each value is rounded once, to nearest with ties to even. So the CPU and the
Triton kernels agree in every bit of q and scale. Zeros pad incomplete blocks, and do not change amax.

Shape suffixes: M rows, K columns, m and k blocks of rows and columns.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from train.kernels.fp8.formats import Cast, ScaleBlock, pack_e5m6, round_to, unpack_e5m6


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantised tensor, with one scale per block. Its values are q * scale."""

    q: Tensor
    """Codes (..., M, K) in the format's dtype; for E5M6 (..., M, 3 ceil(K / 2)) uint8."""
    scale: Tensor
    """Scales (..., ceil(M / rows), ceil(K / columns)), fp32."""
    cast: Cast
    """The cast that produced q and scale. Its block is at most as large as the tensor."""
    shape: torch.Size
    """Shape of the tensor, (..., M, K), without padding."""


def scales(amax: Tensor, cast: Cast) -> tuple[Tensor, Tensor]:
    """Returns the fp32 scale and inverse of blocks. amax: max-abs of each block; NaN gives NaN."""
    amax = amax.float().clamp_min(cast.floor)
    maximum = torch.full_like(amax, cast.format.max)  # a tensor, because torch would multiply by a number's reciprocal
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
    """Returns the cast, with its block limited to the tensor's shape."""
    block = min(cast.block[0], max(x_MK.shape[-2], 1)), min(cast.block[1], max(x_MK.shape[-1], 1))
    return cast if block == cast.block else replace(cast, block=block)


def blocked(x_MK: Tensor, block: ScaleBlock) -> Tensor:
    """Splits x into zero-padded blocks: (..., M, K) -> (..., m, rows, k, columns)."""
    rows, columns = block
    below, right = -x_MK.shape[-2] % rows, -x_MK.shape[-1] % columns
    if below or right:
        x_MK = torch.nn.functional.pad(x_MK, (0, right, 0, below))
    lead, (height, width) = x_MK.shape[:-2], x_MK.shape[-2:]
    return x_MK.reshape(*lead, height // rows, rows, width // columns, columns)


def unblocked(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Reverses `blocked`: returns a contiguous tensor (..., M, K), without padding."""
    whole = blocks.flatten(-4, -3).flatten(-2, -1)
    return whole if whole.shape == shape else whole[..., : shape[-2], : shape[-1]].contiguous()


def quantize(x_MK: Tensor, cast: Cast) -> QuantizedTensor:
    """Quantise a tensor (..., M, K) into codes and scales."""
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
    # fp16 represents every code exactly. Its product with an fp32 scale is rounded once, to fp32 (fp64 in mode=prove).
    values = unpack_e5m6(x.q, x.shape[-1]) if x.cast.format.dtype is None else x.q.half()
    return unblocked((blocked(values, x.cast.block) * x.scale[..., :, None, :, None]).to(dtype), values.shape)


def exact_dtype(cast: Cast) -> torch.dtype:
    """Returns the smallest dtype that holds dequantised values: bf16 if scales are powers of two, else fp32."""
    return torch.bfloat16 if cast.pow2 else torch.float32


class EagerCasts:
    """Casts for the CPU emulation, in torch operations; see also train/kernels/fp8/compiled_casts.py."""

    def quantize(self, x_MK: Tensor, cast: Cast) -> QuantizedTensor:
        """Returns codes and scales of x."""
        return quantize(x_MK, cast)

    def fake_quantize(self, x: Tensor | QuantizedTensor, cast: Cast, dtype: torch.dtype) -> Tensor:
        """Returns the values that x has after the cast, in `dtype`."""
        return dequantize(quantize(dequantize(x) if isinstance(x, QuantizedTensor) else x, cast), dtype)

    def dequantize(self, x: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        """Returns the values of a quantised tensor, in `dtype`."""
        return dequantize(x, dtype)
