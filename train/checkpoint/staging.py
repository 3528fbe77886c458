"""Writes live shards to a rank's data file, in two steps.

1. `StagingBuffers.copy` copies the shards into CPU buffers. Then the training continues.
2. `StagingBuffers.write` writes the buffers in a thread, with a CRC-32 for each block.

Later saves reuse the buffers, because allocating page-locked memory is slow. The safetensors library is not used,
because it has neither checksums nor fsync.
"""

import json
import math
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.comm_ring import wrote
from cluster.run_files import data_name
from conf.disk import naming
from conf.files import open_plain
from conf.thresholds import THRESHOLDS
from parallel.shard import Shard
from train.checkpoint.manifest import CRC_BLOCK

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Maps dtypes to their names in the safetensors format."""
WRITE_BYTES = 16 << 20
"""Maximum bytes of one write call: small, to show progress."""
DTYPE_BYTES = {name: dtype.itemsize for dtype, name in DTYPES.items()}
"""Maps safetensors' dtype names to the bytes of an element."""


@dataclass(frozen=True)
class StagedLayout:
    """The positions of shards in a rank's data file."""

    places: dict[str, tuple[str, tuple[int, ...], int, int, int]]
    """Maps a shard's name to (dtype, logical shape, first element, count, first byte)."""
    header: bytes
    data_bytes: int


def lay_out_shards(shards: dict[str, Shard]) -> StagedLayout:
    """Computes the file layout for shards, as one-dimensional intervals."""
    for name, shard in shards.items():
        assert shard.local.dtype in DTYPES, f"{name}: {shard.local.dtype} has no name in the safetensors format"
    header, offsets, size = safetensors_header(
        (name, DTYPES[shards[name].local.dtype], [shards[name].local.numel()]) for name in sorted(shards)
    )
    places = {}
    for name, at in offsets.items():
        local = shards[name].local
        places[name] = (DTYPES[local.dtype], tuple(shards[name].shape), shards[name].offset, local.numel(), at)
    return StagedLayout(places, header, size)


def safetensors_header(
    tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: dict[str, str] | None = None
) -> tuple[bytes, dict[str, int], int]:
    """Builds the header of a file with tensors: (name, dtype name, shape).

    Returns the header, each tensor's first byte in the data part, and the bytes of the data part. Tensors with large
    elements come first, because the format forbids padding.
    """
    header: dict[str, dict[str, Any]] = {} if metadata is None else {"__metadata__": metadata}
    offsets, at = {}, 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: -DTYPE_BYTES[tensor[1]]):
        offsets[name], end = at, at + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets, at


class StagingBuffers:
    """The buffers of one rank, for one save at a time."""

    def __init__(self, pinned: bool, most: int = 0):
        """pinned: whether buffers are page-locked. most: maximum bytes; 0: the size of the state."""
        self.pinned, self.most = pinned, most and max(most, THRESHOLDS.staging_bytes)
        self.segments: list[Tensor] = []
        self.layout = StagedLayout({}, b"", 0)
        self._live: dict[str, Shard] = {}
        """Shards of the current save until they are completely copied."""

    def copy(self, shards: dict[str, Shard]) -> None:
        """Copy the shards into the buffers. Then the caller may change the shards.

        If `in_pieces` is true, `write` copies them, and the caller may change them only after `write` returns.
        """
        self.layout, self._live = lay_out_shards(shards), shards
        self._fit(self._room)
        if not self.in_pieces:
            self._fill(0)
            self._live = {}

    @property
    def in_pieces(self) -> bool:
        """Whether the current state is larger than the buffers."""
        return self._room < self.layout.data_bytes

    @property
    def _room(self) -> int:
        return min(self.layout.data_bytes, self.most or self.layout.data_bytes)

    def _fill(self, start: int) -> None:
        """Fill the buffers with the file's data part, from its byte `start` on."""
        devices = set()
        for name, (*_, at) in self.layout.places.items():
            raw = self._live[name].local.detach().view(torch.uint8)
            done, end = max(at, start), min(at + raw.numel(), start + self._room)
            while done < end:
                segment, offset = divmod(done - start, THRESHOLDS.staging_bytes)
                size = min(end - done, THRESHOLDS.staging_bytes - offset)
                part = raw[done - at : done - at + size]
                self.segments[segment][offset : offset + size].copy_(part, non_blocking=self.pinned)
                done += size
            devices |= {raw.device} if raw.is_cuda else set()
        for device in devices:  # otherwise the caller could change the shards before the copies end
            torch.cuda.synchronize(device)

    def write(self, folder: Path, rank: int) -> dict[str, Any]:
        """Write this rank's data file and fsync it. Returns its index."""
        header, blocks, left = self.layout.header, Checksums(), self.layout.data_bytes
        path = folder / data_name(rank)
        with naming(path, len(header) + left), open(path, "wb", buffering=0, opener=open_plain) as file:
            _write_all(file.fileno(), memoryview(header))
            while left:
                if self.in_pieces:
                    self._fill(self.layout.data_bytes - left)
                piece = min(self._room, left)
                for segment in self.segments:
                    view = segment.numpy().data[:piece]
                    blocks.add(view)
                    _write_all(file.fileno(), view)
                    piece, left = piece - len(view), left - len(view)
            os.fsync(file.fileno())
        return {
            "header_bytes": len(header),
            "header_crc32": zlib.crc32(header),
            "data_bytes": self.layout.data_bytes,
            "blocks_crc32": blocks.all,
            "tensors": self.layout.places,
        }

    def _fit(self, size: int) -> None:
        """Resize the segments to `size` bytes in total, and reuse large ones."""
        most = THRESHOLDS.staging_bytes
        wanted = [min(most, size - start) for start in range(0, size, most)]
        kept = self.segments[: len(wanted)]
        self.segments = [
            kept[i] if i < len(kept) and kept[i].numel() >= bytes_ else self._buffer(bytes_)
            for i, bytes_ in enumerate(wanted)
        ]

    def _buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)


class Checksums:
    """Computes the CRC-32 of every block of data."""

    def __init__(self) -> None:
        self.all: list[int] = []
        self._room = 0
        """Number of bytes by which the last block may still grow."""

    def add(self, view: memoryview) -> None:
        while view:
            if not self._room:
                self.all.append(0)
                self._room = CRC_BLOCK
            part = view[: self._room]
            self.all[-1] = zlib.crc32(part, self.all[-1])
            self._room -= len(part)
            view = view[len(part) :]


def _write_all(handle: int, view: memoryview) -> None:
    while view:
        size = os.write(handle, view[:WRITE_BYTES])
        wrote(size)
        view = view[size:]
