"""Reads a folder of safetensors into live shards. Each rank reads only the rows that contain elements of its shards.

The file is not memory-mapped, because mapped pages would count as this process's memory.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import Tensor

from cluster.comm_ring import got_on
from conf.disk import cure_of_reading
from parallel.shard import Shard
from train.hf.blocks import dequantize
from train.hf.config import SCALE_BLOCK
from train.hf.folder import FP8, Folder
from train.hf.tensor_names import SCALE, PlacedTensor

READ_ELEMENTS = 1 << 23
"""Elements that are converted at a time: about 32 MB in fp32."""


@dataclass
class ShardPart:
    """The part of a Hugging Face tensor that a shard needs."""

    placed: PlacedTensor
    start: int
    """Index of the first element in the flattened Hugging Face tensor."""
    target: Tensor
    """Slice of the shard's memory that gets the part.

    If the tensor is an MTP module's copy of embedding or head, it is only compared with this slice.
    """


def fill_from_folder(folder: Folder, placed: list[PlacedTensor], wanted: dict[str, Shard]) -> int:
    """Fill every wanted shard with the folder's values, in the shard's dtype. Returns the number of bytes read.

    Raises UserError for a value that is not finite, a scale that is not above 0, or a copy in an MTP module that
    differs from the original.
    """
    reader = _Reader(folder)
    originals = parts_of([each for each in placed if not each.copy], wanted)
    filled = sum(part.target.numel() for part in originals)
    assert filled == sum(shard.local.numel() for shard in wanted.values()), "match() leaves no holes"
    for part, start, values in reader.values(originals):
        if not torch.isfinite(values).all():
            raise folder.refuse(f"{part.placed.theirs} has values that are not finite", "give other weights")
        part.target[start : start + values.numel()].copy_(values)
        got_on()
    for part, start, values in reader.values(parts_of([each for each in placed if each.copy], wanted)):
        original = part.target[start : start + values.numel()]
        if not torch.equal(original, values.to(original.dtype)):
            raise folder.refuse(
                f"{part.placed.theirs} must be a copy of {part.placed.ours.removeprefix('master.')}: the main model and its MTP modules share this tensor",
                "set model.mtp_depth=0 to leave out the MTP modules",
            )
    return reader.bytes


def folder_reader(folder: Folder, placed: list[PlacedTensor]) -> Callable[[dict[str, Shard]], int]:
    """Return a function that fills shards like `fill_from_folder`, and is fast for a few shards per call."""
    by_name: dict[str, list[PlacedTensor]] = {}
    for each in placed:
        by_name.setdefault(each.ours, []).append(each)
    return lambda wanted: fill_from_folder(folder, [each for name in wanted for each in by_name.get(name, ())], wanted)


def parts_of(placed: list[PlacedTensor], wanted: dict[str, Shard]) -> list[ShardPart]:
    """Return the intersections of Hugging Face tensors with wanted shards."""
    by_name: dict[str, list[PlacedTensor]] = {}
    for each in placed:
        by_name.setdefault(each.ours, []).append(each)
    found = []
    for name, shard in wanted.items():
        theirs = sorted(by_name.get(name, ()), key=lambda each: each.start)
        assert all(each.whole == tuple(shard.shape) for each in theirs), name
        stop = shard.offset + shard.local.numel()
        first = max(0, bisect_right([each.start for each in theirs], shard.offset) - 1)
        for each in theirs[first:]:
            low, high = max(each.start, shard.offset), min(each.start + each.count, stop)
            if low < high:
                target = shard.local.detach()[low - shard.offset : high - shard.offset]
                found.append(ShardPart(each, low - each.start, target))
    return found


class _Reader:
    """Reads rows of tensors, and counts the bytes that it reads."""

    def __init__(self, folder: Folder):
        self.folder, self.bytes = folder, 0

    def values(self, parts: list[ShardPart]) -> Iterable[tuple[ShardPart, int, Tensor]]:
        """Yield (part, index in the part's target, values), a few rows at a time."""
        by_file: dict[str, list[ShardPart]] = {}
        for part in parts:
            by_file.setdefault(self.folder.stored[part.placed.theirs].file, []).append(part)
        for file, here in sorted(by_file.items()):
            try:
                with safe_open(self.folder.path / file, framework="pt", backend="pread") as opened:
                    for part in here:
                        yield from self._rows(opened, part)
            except OSError as error:
                raise self.folder.refuse(f"{file} cannot be read: {error}", cure_of_reading(error)) from error

    def _rows(self, opened, part: ShardPart) -> Iterable[tuple[ShardPart, int, Tensor]]:
        shape = part.placed.shape
        width = shape[1] if len(shape) == 2 else 1
        stop = part.start + part.target.numel()
        step = max(1, READ_ELEMENTS // width // SCALE_BLOCK) * SCALE_BLOCK
        for row in range(part.start // width, -(-stop // width), step):
            end = min(row + step, -(-stop // width))
            flat = self._read(opened, part.placed.theirs, row, end).flatten()
            low, high = max(part.start, row * width), min(stop, end * width)
            yield part, low - part.start, flat[low - row * width : high - row * width]

    def _read(self, opened, name: str, row: int, end: int) -> Tensor:
        """Return the rows [row, end) in fp32, without rounding."""
        tensor = opened.get_slice(name)[row:end]
        self.bytes += tensor.nbytes
        if self.folder.stored[name].dtype != FP8:
            return tensor.float()
        first = row // SCALE_BLOCK
        scale = self._scale(opened, name)[first : -(-end // SCALE_BLOCK)]
        above = row - first * SCALE_BLOCK  # number of rows of the first block that precede `row`
        padded = torch.nn.functional.pad(tensor.view(torch.uint8), (0, 0, above, 0)).view(tensor.dtype)
        return dequantize(padded, scale)[above:]

    def _scale(self, opened, name: str) -> Tensor:
        """Return all scales of an FP8 weight, from any file. Raises UserError."""
        name, stored = name + SCALE, self.folder.stored
        if stored[name].file == stored[name.removesuffix(SCALE)].file:
            scale = opened.get_tensor(name)
        else:
            with safe_open(self.folder.path / stored[name].file, framework="pt", backend="pread") as other:
                scale = other.get_tensor(name)
        self.bytes += scale.nbytes
        if not (scale.float() > 0).all():
            raise self.folder.refuse(f"{name} must have only scales above 0", "download it again")
        return scale.float()
