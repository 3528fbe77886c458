"""Rows as an FP8 wire brought them: for a product that takes them so, and to all else the values that they stand for.

A `QuantizedRows` is a tensor of the activation format that holds E4M3 values and their scales.  Autograd hands it on like
any tensor, forward as rows and backward as their gradient.  The experts of an FP8 recipe take its parts; any other
operation gets its values, so nothing else needs to know that it exists.  Gathering rows gives rows in the same form.

Shapes: R rows, D channels, S tiles of 128 channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

TILE = 128
"""Values of a row that share a scale, on the wire and along the contraction of a product; also the side of a weight's block (paper 3.3.2)."""
_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
"""The value of every byte."""
Widen = Callable[[Tensor], Tensor]
"""From values in FP8 to the same in fp32."""


def widen(q_RD: Tensor) -> Tensor:
    """FP8 values in fp32, by the way that is fast on the device. torch converts FP8 on a CPU one by one; to look up each of the 256 takes a fifth of that.

    The table follows the rows to the meta device, where plans see what a CPU does.
    """
    if q_RD.is_cuda:
        return q_RD.float()
    return _E4M3.to(q_RD.device).index_select(0, q_RD.view(torch.uint8).flatten().int()).view(q_RD.shape)


class QuantizedRows(Tensor):
    """Rows (R, D): q_RD times the scale of its tile, which bf16 holds exactly.

    q_RD: float8_e4m3fn, its rows perhaps apart in memory. scale_RS: fp32 powers of two.
    floor: smallest max-abs of a tile that a scale was made for. dtype: format of the values. widen: how they get there.
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
        """The rows as a plain tensor."""
        return dequantize(self.q_RD, self.scale_RS, self.dtype, self.widen)

    def _gather(self, index_X: Tensor) -> "QuantizedRows":
        q_XD = self.q_RD.view(torch.uint8).index_select(0, index_X).view(self.q_RD.dtype)
        return QuantizedRows(q_XD, self.scale_RS.index_select(0, index_X), self.scale_floor, self.dtype, self.widen)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"QuantizedRows(q_RD={self.q_RD!r}, scale_RS={self.scale_RS!r})"


def dequantize(q_RD: Tensor, scale_RS: Tensor, dtype: torch.dtype, widen: Widen = widen) -> Tensor:
    """q_RD times the scale of its tile, of dtype."""
    return in_tiles(widen(q_RD)).mul_(scale_RS[..., None]).flatten(1)[:, : q_RD.shape[1]].to(dtype)


def in_tiles(x_RD: Tensor) -> Tensor:
    """Rows as (R, S, 128), the last tile filled with zeros."""
    width = x_RD.shape[1]
    if width % TILE:
        x_RD = torch.nn.functional.pad(x_RD, (0, -width % TILE))
    return x_RD.unflatten(1, (-(-width // TILE), TILE))
