"""Safetensors files written in pieces: the header says where everything will lie, then the values come as they are made.

The library's own writer wants all tensors of a file in memory; this one needs only the piece at hand.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from train.checkpoint.staging import DTYPE_BYTES, DTYPES, safetensors_header


@dataclass(frozen=True)
class ExportTensor:
    """One tensor to write."""

    name: str
    dtype: str
    """The name that safetensors gives the format."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class PieceWriter:
    """One safetensors file, open. Use it in `with`; leaving it without error means that every byte was written."""

    def __init__(self, path: Path, outs: list[ExportTensor], metadata: dict[str, str] | None = None):
        self._outs = {out.name: out for out in outs}
        tensors = [(out.name, out.dtype, out.shape) for out in outs]
        header, self._offsets, self._left = safetensors_header(tensors, {"format": "pt"} | (metadata or {}))
        self._start = len(header)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._write(header, 0)

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Put values, of the type that was announced, from element `start` on. OSError if the disk cannot take them."""
        out = self._outs[name]
        assert DTYPES[values.dtype] == out.dtype, f"{name} was announced as {out.dtype}"
        raw = values.detach().contiguous().view(-1).view(torch.uint8).numpy()
        self._write(raw.data, self._start + self._offsets[name] + start * values.element_size())
        self._left -= raw.nbytes

    def __enter__(self) -> "PieceWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            assert kind is not None or self._left == 0, f"{self._left} bytes were announced and not written"
        finally:
            os.close(self._handle)

    def _write(self, data: bytes | memoryview, position: int) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._handle, view, position)
            view, position = view[count:], position + count
