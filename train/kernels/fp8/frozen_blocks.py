"""Stores frozen weights only in block FP8: E4M3 codes, and an fp32 scale for each 128x128 block.

Each matrix is stored as bytes: first its scales, then its codes. If the parameter had a floating-point dtype, DeepSpeed
would round it, and gloo could not gather FP8. Each matmul and each backward compute the values again.

Shapes: E experts, M rows, K columns, m and k blocks of rows and columns, B bytes of a matrix.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from conf.adapters import is_held_in_blocks
from train.kernels.fp8.formats import E4M3, TILE, Cast
from train.kernels.fp8.quantize import QuantizedTensor, dequantize, fitted, quantize
from train.model.deepseek import DeepSeekV3
from train.model.init import draw_normal
from train.model.layers import PACKED
from train.model.moe import Experts
from train.model.recompute import RecomputedOutputs

BLOCKS = Cast(E4M3, (TILE, TILE), pow2=False)
MATRIX_ALIGNMENT = 4
"""Alignment of every matrix, in bytes, for its fp32 scales."""


class FrozenBlocks:
    """A weight (M, K), or (E, M, K) for experts, stored as uint8 (B,) or (E, B)."""

    def __init__(self, module: nn.Module, name: str):
        weight = getattr(module, name)
        self._module, self._name = module, name
        self.shape: tuple[int, ...] = tuple(weight.shape)
        self.experts: range | None = module.local if isinstance(module, Experts) else None
        """Indices of the weight's experts; None for a weight without experts."""
        rows, columns = self.shape[-2:]
        self._scales = -(-rows // TILE), -(-columns // TILE)
        self._scale_bytes = MATRIX_ALIGNMENT * math.prod(self._scales)
        self.matrix_bytes = -(-(self._scale_bytes + rows * columns) // MATRIX_ALIGNMENT) * MATRIX_ALIGNMENT
        data = torch.empty(*self.shape[:-2], self.matrix_bytes, dtype=torch.uint8, device=weight.device)
        setattr(module, name, nn.Parameter(data, requires_grad=False))

    @property
    def data(self) -> nn.Parameter:
        """The weight's bytes; empty while ZeRO 3 has not gathered them."""
        return getattr(self._module, self._name)

    def unpack(self, dtype: torch.dtype) -> tuple[Tensor, AbstractContextManager]:
        """Returns the values in `dtype`, and a context manager that keeps autograd from saving them."""
        values = self._values(dtype)
        if not torch.is_grad_enabled():
            return values, nullcontext()
        return values, RecomputedOutputs(lambda: self._values(dtype), (), values)

    def pack(self, q_MK: Tensor, scale_mk: Tensor) -> Tensor:
        """Returns a matrix as bytes (B,), from its codes and scales."""
        row = torch.zeros(self.matrix_bytes, dtype=torch.uint8, device=q_MK.device)
        scale, codes = self._parts(row)
        scale.copy_(scale_mk)
        codes.copy_(q_MK.view(torch.uint8))
        return row

    def round(self, values: Tensor) -> None:
        """Quantise `values` in blocks, and store them as the weight."""
        rows = self.data.detach().view(-1, self.matrix_bytes)
        for row, matrix in zip(rows, values.view(-1, *self.shape[-2:]), strict=True):
            found = quantize(matrix, BLOCKS)
            row.copy_(self.pack(found.q, found.scale))

    def _parts(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Returns views of one matrix's bytes: scales (m, k) fp32 and codes (M, K) uint8."""
        codes = row[self._scale_bytes : self._scale_bytes + math.prod(self.shape[-2:])]
        return row[: self._scale_bytes].view(torch.float32).view(self._scales), codes.view(self.shape[-2:])

    def _values(self, dtype: torch.dtype) -> Tensor:
        data = self.data.detach()
        values = torch.empty(self.shape, dtype=dtype, device=data.device)
        rows, matrices = data.view(-1, self.matrix_bytes), values.view(-1, *self.shape[-2:])
        for row, matrix in zip(rows, matrices, strict=True):
            scale, codes = self._parts(row)
            q_MK = codes.view(torch.float8_e4m3fn)
            matrix.copy_(dequantize(QuantizedTensor(q_MK, scale, fitted(BLOCKS, q_MK), q_MK.shape), dtype))
        return values


def hold_in_blocks(chunk: DeepSeekV3) -> None:
    """In a chunk on the meta device, replace weights by bytes if `is_held_in_blocks` accepts their names."""
    for name, _ in list(chunk.named_parameters()):
        if is_held_in_blocks(name):
            prefix, _, own = name.rpartition(".")
            module = chunk.get_submodule(prefix)
            setattr(module, PACKED[own], FrozenBlocks(module, own))


def frozen_blocks(chunk: nn.Module) -> Iterator[tuple[str, FrozenBlocks]]:
    """Iterates over a chunk's `FrozenBlocks`, with their parameter names."""
    for prefix, module in chunk.named_modules():
        for own, attribute in PACKED.items():
            blocks = getattr(module, attribute, None)
            if isinstance(blocks, FrozenBlocks):
                yield f"{prefix}.{own}", blocks


def draw_blocks(chunk: DeepSeekV3, seed: int) -> None:
    """Draw initial values for all frozen blocks, like `initialise`."""
    for name, blocks in frozen_blocks(chunk):
        values = torch.empty(blocks.shape, device=blocks.data.device)
        draw_normal(values, f"{seed}/{name}", chunk.config.init_std, blocks.experts)
        blocks.round(values)
