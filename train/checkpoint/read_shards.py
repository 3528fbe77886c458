"""Loads a checkpoint of any layout into live shards, with CRC-32 checks."""

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

# Intervals of flattened tensors: coverage, and a table of all ranks' intervals.


class NotCovered(ValueError):
    """The intervals of all ranks together do not cover a tensor."""


def first_hole(intervals: list[tuple[int, int]], start: int, stop: int) -> int | None:
    """Returns the first element in [start, stop) outside of all intervals, or None.

    intervals: pairs (start, count), sorted by start.
    """
    reached = start
    for begin, count in intervals:
        if begin > reached:
            break
        reached = max(reached, begin + count)
    return reached if reached < stop else None


def merge_indexes(indexes: list[bytes], meta: dict[str, Any]) -> dict[str, Any]:
    """Builds the manifest's body from all index files. Raises NotCovered."""
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
"""Maps a stored dtype to others that represent its values exactly."""


@dataclass
class FilePiece:
    """The part of a wanted shard that one file contains."""

    name: str
    start: int
    """Index of the part's first element in the flattened logical tensor."""
    target: Tensor
    """Memory of the shard that gets the part's values."""


ReadSpan = Callable[[memoryview, int], int]
"""Reads bytes of a file, from a position, into memory. Returns their number."""


class Files(Protocol):
    """Reads a checkpoint's files, on disk or on other nodes. Raises OSError."""

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
    """Fill the wanted shards from the checkpoint in `path`. Returns its meta, with `step`, `attempt` and `world_size`.

    rounded: whether values may be rounded to a shard's smaller dtype. Raises UserError before any shard changes. Raises
    CheckpointDamaged, perhaps after some shards are filled.
    """
    return fill_shards(read_manifest(path), FolderFiles(path), wanted, rounded)


def fill_shards(manifest: Manifest, files: Files, wanted: dict[str, Shard], rounded: bool = False) -> dict[str, Any]:
    """Like `load_shards`, for a manifest that was already read, and files on any node."""
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
    """Splits a wanted shard into pieces. Returns for each: (rank whose file contains it, piece)."""
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
    """Returns the manifest's entry for a wanted tensor. Raises UserError."""
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
    """Fill the pieces that one rank's file contains, in file order."""
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
    """Read block `number` into `buffer`. Raises CheckpointDamaged."""
    size = min(CRC_BLOCK, index["data_bytes"] - number * CRC_BLOCK)
    view, position = buffer.numpy().data[:size], index["header_bytes"] + number * CRC_BLOCK
    while view:
        count = read(view, position)
        if count == 0:
            raise CheckpointDamaged(path, f"ends {len(view)} bytes early in block {number}")
        view, position = view[count:], position + count
    if zlib.crc32(buffer.numpy().data[:size]) != index["blocks_crc32"][number]:
        raise CheckpointDamaged(path, f"the checksum of block {number} does not match")
