"""Loads a checkpoint of any layout into live shards.

Each wanted shard is an interval of a flattened tensor. The manifest lists the intervals that each rank wrote. A rank
reads the blocks that contain its elements, and compares each block with its CRC-32 before use.
"""

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cluster.comm_ring import got_on
from cluster.run_files import MANIFEST, data_name, index_name
from conf.errors import UserError
from parallel.shard import Shard
from train.checkpoint.manifest import (
    CHECKPOINT_VERSION,
    CRC_BLOCK,
    FORMAT,
    CheckpointDamaged,
    Entry,
    Manifest,
    check_index,
    read_manifest,
)
from train.checkpoint.staging import DTYPES

# Functions for intervals of flattened tensors: they check coverage, and merge the intervals of all ranks into a table.


class NotCovered(ValueError):
    """The intervals of all ranks together do not cover a tensor."""


def first_hole(intervals: list[tuple[int, int]], start: int, stop: int) -> int | None:
    """Returns the first element in [start, stop) that no interval contains; None without such an element.

    intervals: pairs (start, count), sorted by start.
    """
    reached = start
    for begin, count in intervals:
        if begin > reached:
            break
        reached = max(reached, begin + count)
    return reached if reached < stop else None


def merge_indexes(indexes: list[bytes], meta: dict[str, Any]) -> dict[str, Any]:
    """Builds the body of the manifest from the index files of ranks 0, 1, ...

    Intervals of different ranks may overlap, because ranks may hold replicas. Raises NotCovered if no rank wrote some
    element of a tensor.
    """
    ranks = [json.loads(text) for text in indexes]
    tensors: dict[str, tuple[str, list[int], list[tuple[int, int, int]]]] = {}
    files: dict[str, list[int]] = {}
    for rank, (text, index) in enumerate(zip(indexes, ranks, strict=True)):
        assert [index[key] for key in ("rank", "step", "attempt")] == [rank, ranks[0]["step"], ranks[0]["attempt"]]
        files[index_name(rank)] = [len(text), zlib.crc32(text)]
        files[data_name(rank)] = [index["header_bytes"] + index["data_bytes"]]
        for name, (dtype, shape, start, count, _) in index["tensors"].items():
            known = tensors.setdefault(name, (dtype, shape, []))
            if known[:2] != (dtype, shape):
                raise NotCovered(f"{name} is {dtype} {shape} on rank {rank}, but {known[0]} {known[1]} on another")
            known[2].append((rank, start, count))
    for name, (_, shape, intervals) in tensors.items():
        intervals.sort(key=lambda interval: interval[1])
        hole = first_hole([interval[1:] for interval in intervals], 0, math.prod(shape))
        if hole is not None:
            raise NotCovered(f"no rank saved element {hole} of {name}, shape {shape}")
    identity = {"step": ranks[0]["step"], "attempt": ranks[0]["attempt"], "world_size": len(ranks)}
    return {
        "format": FORMAT,
        "version": CHECKPOINT_VERSION,
        **identity,
        "meta": meta,
        "files": files,
        "tensors": tensors,
    }


TORCH = {name: dtype for dtype, name in DTYPES.items()}
LOSSLESS = {
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
    torch.int32: (torch.int64,),
}
"""Maps a stored dtype to other dtypes, which represent all of the stored values exactly."""


@dataclass
class FilePiece:
    """A part of a wanted shard, all of whose bytes are in one file."""

    name: str
    start: int
    """Index of the part's first element in the flattened logical tensor."""
    target: Tensor
    """Memory of the shard that gets the part's values."""


ReadSpan = Callable[[memoryview, int], int]
"""A function that reads bytes of a file, from a byte position, into the given memory.

It returns the number of bytes read.
"""


class Files(Protocol):
    """Reads the files of a checkpoint, on disk or on other nodes. Its methods may raise OSError."""

    def index(self, rank: int) -> bytes:
        """Returns the index of a rank's data file."""

    def data(self, rank: int) -> AbstractContextManager[ReadSpan]:
        """Opens a rank's data file for partial reads."""


class FolderFiles:
    """Reads the files of a checkpoint in one folder on disk."""

    def __init__(self, folder: Path):
        self._folder = folder

    def index(self, rank: int) -> bytes:
        return (self._folder / index_name(rank)).read_bytes()

    @contextmanager
    def data(self, rank: int) -> Iterator[ReadSpan]:
        with open(self._folder / data_name(rank), "rb", buffering=0) as file:
            yield lambda view, position: os.preadv(file.fileno(), [view], position)


def load_shards(path: Path, wanted: dict[str, Shard], rounded: bool = False) -> dict[str, Any]:
    """Fill the memory of every wanted shard from the checkpoint in `path`.

    rounded: whether values may be rounded to a smaller dtype of the shard. Returns the stored meta, with `step`,
    `attempt` and `world_size`.

    Raises UserError before any shard changes if the folder is not a checkpoint, has a newer format, or does not fit
    `wanted`. Raises CheckpointDamaged (a UserError) for a missing file or a wrong checksum; then some shards may be
    filled.
    """
    return fill_shards(read_manifest(path), FolderFiles(path), wanted, rounded)


def fill_shards(manifest: Manifest, files: Files, wanted: dict[str, Shard], rounded: bool = False) -> dict[str, Any]:
    """Fill shards from a checkpoint whose manifest was already read. Its files may be on disk or on other nodes.

    rounded: as in `load_shards`.
    """
    pieces: dict[int, list[FilePiece]] = {}
    for name, shard in wanted.items():
        for rank, piece in _pieces(manifest, name, shard, rounded):
            pieces.setdefault(rank, []).append(piece)
    buffer = torch.empty(CRC_BLOCK, dtype=torch.uint8)
    for rank, parts in sorted(pieces.items()):
        try:
            _read_rank(manifest, files, rank, parts, buffer)
        except OSError as error:
            file = error.filename or data_name(rank)  # an error of a read call has no file name
            raise CheckpointDamaged(manifest.folder / file, error) from error
    identity = {"step": manifest.step, "attempt": manifest.attempt, "world_size": manifest.world_size}
    return {**manifest.meta, **identity}


def _pieces(manifest: Manifest, name: str, shard: Shard, rounded: bool) -> list[tuple[int, FilePiece]]:
    """Splits a wanted shard into pieces. Returns pairs: the rank whose file contains the piece, and the piece."""
    entry = _compatible(manifest, name, shard, rounded)
    stop = shard.offset + shard.local.numel()
    spans = [(start, count) for _, start, count in entry.intervals]
    if (hole := first_hole(spans, shard.offset, stop)) is not None:
        raise UserError(
            f"checkpoint: {name}",
            manifest.folder,
            f"must hold elements {shard.offset} to {stop} of {name}; element {hole} is in no file",
            "use another checkpoint",
        )
    found, reached = [], shard.offset
    for rank, start, count in entry.intervals:
        end = min(start + count, stop)
        if start <= reached < end:
            target = shard.local.detach()[reached - shard.offset : end - shard.offset]
            found.append((rank, FilePiece(name, reached, target)))
            reached = end
    return found


def _compatible(manifest: Manifest, name: str, shard: Shard, rounded: bool) -> Entry:
    """Returns the manifest's entry for a wanted tensor. Raises UserError if its shape or dtype does not fit."""
    entry, shape = manifest.tensors.get(name), tuple(shard.shape)
    if entry is None:
        raise UserError(
            f"checkpoint: {name}",
            manifest.folder,
            f"must hold the tensor {name}; it has {len(manifest.tensors)} other tensors",
            "use the model and optimizer settings in config.yaml of the checkpoint's run",
        )
    if entry.shape != shape:
        raise UserError(
            f"checkpoint: {name}",
            manifest.folder,
            f"the tensor has shape {entry.shape} in the checkpoint, but {shape} in this model",
            "use the model settings in config.yaml of the checkpoint's run",
        )
    if entry.dtype not in TORCH:
        raise CheckpointDamaged(
            manifest.folder / MANIFEST, f"{name} has an element type {entry.dtype} that does not exist"
        )
    stored, dtype = TORCH[entry.dtype], shard.local.dtype
    if not (dtype == stored or dtype in LOSSLESS.get(stored, ()) or (rounded and stored in LOSSLESS.get(dtype, ()))):
        raise UserError(
            f"checkpoint: {name}",
            manifest.folder,
            f"the tensor is {stored} in the checkpoint and {dtype} in this run, which cannot represent every value",
            "use the precision settings in config.yaml of the checkpoint's run",
        )
    return entry


def _read_rank(manifest: Manifest, files: Files, rank: int, pieces: list[FilePiece], buffer: Tensor) -> None:
    """Fill the pieces that one rank's file contains, in file order, so a block that two pieces share is read once."""
    index = check_index(manifest, rank, files.index(rank))
    tensors, path = index["tensors"], manifest.folder / data_name(rank)
    for piece in pieces:
        entry, (dtype, shape, start, count, _) = (
            manifest.tensors[piece.name],
            tensors.get(piece.name, ("", (), 0, 0, 0)),
        )
        known = (dtype, tuple(shape)) == (entry.dtype, entry.shape)
        if not (known and start <= piece.start <= start + count - piece.target.numel()):
            raise CheckpointDamaged(
                manifest.folder / index_name(rank), f"does not have the manifest's position of {piece.name}"
            )

    def first_byte(piece: FilePiece) -> int:
        dtype, _, start, _, at = tensors[piece.name]
        return at + (piece.start - start) * TORCH[dtype].itemsize

    with files.data(rank) as read:
        held = -1
        for piece in sorted(pieces, key=first_byte):
            stored = TORCH[tensors[piece.name][0]]
            at, done = first_byte(piece), 0
            if not 0 <= at <= index["data_bytes"] - piece.target.numel() * stored.itemsize:
                raise CheckpointDamaged(
                    manifest.folder / index_name(rank), f"places {piece.name} outside of its data file"
                )
            while done < piece.target.numel():
                number, offset = divmod(at + done * stored.itemsize, CRC_BLOCK)
                if number != held:
                    _read_block(read, path, index, number, buffer)
                    held = number
                    got_on()
                count = min(piece.target.numel() - done, (CRC_BLOCK - offset) // stored.itemsize)
                piece.target[done : done + count].copy_(buffer[offset : offset + count * stored.itemsize].view(stored))
                done += count


def _read_block(read: ReadSpan, path: Path, index: dict[str, Any], number: int, buffer: Tensor) -> None:
    """Read block `number` of the data into `buffer`. Raises CheckpointDamaged for a short block or a wrong checksum."""
    size = min(CRC_BLOCK, index["data_bytes"] - number * CRC_BLOCK)
    view, position = buffer.numpy().data[:size], index["header_bytes"] + number * CRC_BLOCK
    while view:
        count = read(view, position)
        if count == 0:
            raise CheckpointDamaged(path, f"ends {len(view)} bytes early in block {number}")
        view, position = view[count:], position + count
    if zlib.crc32(buffer.numpy().data[:size]) != index["blocks_crc32"][number]:
        raise CheckpointDamaged(path, f"the checksum of block {number} does not match")
