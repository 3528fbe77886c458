"""From a folder of safetensors into live shards: each rank reads the rows that its own elements lie in, nothing else.

Their tensors are intervals of ours (see names.py), and so is what a rank holds of ours, whatever ZeRO, experts and
pipelines make of it. The intersections say which rows to read, and they pass through memory a few at a time, read and not
mapped: mapped pages of a file would count to this process.

The whole model of a Hugging Face folder in one process.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from conf.disk import cure_of_reading
from conf.schema import Model
from parallel.shard import Shard, whole
from train.checkpoint.stored_weights import open_pairs
from train.hf.blocks import dequantize
from train.hf.config import SCALE_BLOCK
from train.hf.families import FAMILIES
from train.hf.folder import FP8, Folder, match, open_model
from train.hf.tensor_names import SCALE, PlacedTensor
from train.kernels.plain.high import HighPrecision
from train.kernels.plain.plain_kernels import PlainKernels
from train.model.deepseek import DeepSeekV3
from train.model.init import materialise
from train.model.operations import Kernels

READ_ELEMENTS = 1 << 23
"""Elements that are converted at a time, about: 32 MB in fp32."""


@dataclass
class ShardPart:
    """What one wanted shard takes of one of their tensors."""

    placed: PlacedTensor
    start: int
    """First element, in the flattened tensor of theirs."""
    target: Tensor
    """The memory to fill, or for a copy to compare with."""


def fill_from_folder(folder: Folder, placed: list[PlacedTensor], wanted: dict[str, Shard]) -> int:
    """Fill every wanted shard with the folder's values, dequantised and, for shards of another type, rounded to it.

    placed: from `match`. Returns the bytes read. Raises UserError where a value is not finite, or where an MTP module's copy of
    embedding or head is not the same as the original.
    """
    reader = _Reader(folder)
    originals = parts_of([each for each in placed if not each.copy], wanted)
    filled = sum(part.target.numel() for part in originals)
    assert filled == sum(shard.local.numel() for shard in wanted.values()), "match() leaves no holes"
    for part, start, values in reader.values(originals):
        if not torch.isfinite(values).all():
            raise folder.refuse(f"{part.placed.theirs} holds values that are not finite", "give other weights")
        part.target[start : start + values.numel()].copy_(values)
    for part, start, values in reader.values(parts_of([each for each in placed if each.copy], wanted)):
        original = part.target[start : start + values.numel()]
        if not torch.equal(original, values.to(original.dtype)):
            raise folder.refuse(
                f"{part.placed.theirs} must be a copy of {part.placed.ours.removeprefix('master.')}: here the main model "
                "and its MTP modules have one",
                "set model.mtp_depth=0 to do without the MTP modules",
            )
    return reader.bytes


def folder_reader(folder: Folder, placed: list[PlacedTensor]) -> Callable[[dict[str, Shard]], int]:
    """`fill_from_folder` for many calls, each of a few of their many tensors."""
    by_name: dict[str, list[PlacedTensor]] = {}
    for each in placed:
        by_name.setdefault(each.ours, []).append(each)
    return lambda wanted: fill_from_folder(folder, [each for name in wanted for each in by_name.get(name, ())], wanted)


def parts_of(placed: list[PlacedTensor], wanted: dict[str, Shard]) -> list[ShardPart]:
    """Intersections of their tensors with the wanted shards, by file."""
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
    """Reads rows and counts the bytes."""

    def __init__(self, folder: Folder):
        self.folder, self.bytes = folder, 0

    def values(self, parts: list[ShardPart]) -> Iterable[tuple[ShardPart, int, Tensor]]:
        """(part, first element in its target, values) a few rows at a time, every file opened once."""
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
        """Rows [row, end) in fp32, exact."""
        tensor = opened.get_slice(name)[row:end]
        self.bytes += tensor.nbytes
        if self.folder.stored[name].dtype != FP8:
            return tensor.float()
        first = row // SCALE_BLOCK
        scale = self._scale(opened, name)[first : -(-end // SCALE_BLOCK)]
        above = row - first * SCALE_BLOCK  # rows of the first block that are not read
        padded = torch.nn.functional.pad(tensor.view(torch.uint8), (0, 0, above, 0)).view(tensor.dtype)
        return dequantize(padded, scale)[above:]

    def _scale(self, opened, name: str) -> Tensor:
        """All scales of a weight, which may lie in another file."""
        name, stored = name + SCALE, self.folder.stored
        if stored[name].file == stored[name.removesuffix(SCALE)].file:
            scale = opened.get_tensor(name)
        else:
            with safe_open(self.folder.path / stored[name].file, framework="pt", backend="pread") as other:
                scale = other.get_tensor(name)
        self.bytes += scale.nbytes
        return scale.float()


def load_hf_model(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    field: str = "init_from",
    kernels: Kernels | None = None,
    text_only: bool = False,
    adapter: str | None = None,
) -> tuple[Model, DeepSeekV3, Path | None]:
    """The whole model of a folder on CPU in eval mode, its configuration, and the path of its tokenizer.json, if any.

    Weights are held and multiplied in dtype, and read straight into it: memory for the model once. field: what errors
    name. kernels: that the model computes with; torch's operations if not given. text_only: leave out what belongs to no language
    model. adapter: a folder of PEFT's to be added to the weights. Raises UserError for a folder that is no sound DeepSeek-V3.
    """
    path = Path(folder).expanduser()
    headers, config, _ = open_model(path, field, text_only)
    placed = match(headers, config)
    seq_len = min(config.max_seq_len, config.yarn.original_seq_len)
    model = DeepSeekV3.whole(
        config, HighPrecision(dtype, kernels or PlainKernels()), seq_len=seq_len, dtype=dtype, device="meta"
    )
    materialise(model, "cpu")
    wanted = {f"master.{name}": whole(param) for name, param in model.named_parameters()}
    if FAMILIES[headers.family].has_biases:
        wanted |= {f"bias.{name}": whole(router.bias_E) for name, router in model.routers().items()}
    read = folder_reader(headers, placed)
    pairs = open_pairs(adapter, config, headers.family, read)
    if pairs is None:
        read(wanted)
    else:
        pairs.fill_added(read, wanted)
    tokenizer = path / "tokenizer.json"
    return config, model.eval(), tokenizer if tokenizer.is_file() else None
