"""Plans and writes the tensors of an export, and reports about each."""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.adapters import is_adapter
from conf.errors import UserError
from conf.optimizers import OPTIMIZERS
from conf.schema import ExportType
from train.checkpoint.manifest import HOOK_STATE, Manifest, holds_adapter
from train.checkpoint.staging import DTYPE_BYTES, DTYPES, safetensors_header
from train.hf.config import scale_shape
from train.hf.tensor_names import SCALE, PlacedTensor

# Writes the header of a safetensors file, then each piece of values when it is computed. The safetensors library would
# need all tensors in memory.


@dataclass(frozen=True)
class ExportTensor:
    """One tensor to write."""

    name: str
    dtype: str
    """Name of the dtype in safetensors."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class PieceWriter:
    """Writes one safetensors file in pieces. On exit, the context manager asserts that the file is complete."""

    def __init__(self, path: Path, outs: list[ExportTensor], metadata: dict[str, str] | None = None):
        self._outs = {out.name: out for out in outs}
        tensors = [(out.name, out.dtype, out.shape) for out in outs]
        header, self._offsets, self._left = safetensors_header(tensors, {"format": "pt"} | (metadata or {}))
        self._start = len(header)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._write(header, 0)

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write values into the tensor `name`, from element `start` on. Raises OSError."""
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


OPTIMIZER_TENSORS = {
    **{f"{name}.": f"{what} of the optimizer" for one in OPTIMIZERS.values() for name, what in one.meanings},
    "running.": "past loads of the experts",
    HOOK_STATE: "state of a callback",
}
PLAIN_EXPORT_TYPES = {ExportType.bf16: "BF16", ExportType.fp8: "BF16", ExportType.fp32: "F32"}


@dataclass(frozen=True)
class WrittenTensor:
    """A Hugging Face tensor and the tensors to write for it."""

    placed: PlacedTensor
    outs: tuple[ExportTensor, ...]
    """The tensor itself, and in FP8 also its scales."""

    @property
    def nbytes(self) -> int:
        return sum(out.nbytes for out in self.outs)


@dataclass(frozen=True)
class PlannedFile:
    name: str
    written: list[WrittenTensor]


def plan_files(
    placed: list[PlacedTensor], dtype: ExportType, shard_bytes: float, stem: str = "model"
) -> list[PlannedFile]:
    """Distributes the tensors, in order, over files of at most shard_bytes. A larger tensor gets its own file."""
    groups: list[list[WrittenTensor]] = []
    room = 0.0
    for each in placed:
        written = WrittenTensor(each, tuple(_outs(each, dtype)))
        if not groups or written.nbytes > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(written)
        room -= written.nbytes
    count = len(groups)
    return [
        PlannedFile(f"{stem}-{number:05}-of-{count:05}.safetensors", group) for number, group in enumerate(groups, 1)
    ]


def _outs(placed: PlacedTensor, dtype: ExportType) -> Iterator[ExportTensor]:
    if placed.ours.startswith("bias."):  # fp32, because bf16 rounding could change which experts are chosen
        yield ExportTensor(placed.theirs, "F32", placed.shape)
    elif placed.fp8 and dtype == ExportType.fp8:
        yield ExportTensor(placed.theirs, "F8_E4M3", placed.shape)
        yield ExportTensor(placed.theirs + SCALE, "F32", scale_shape(placed.shape))
    else:
        yield ExportTensor(placed.theirs, PLAIN_EXPORT_TYPES[dtype], placed.shape)


def index_json(files: list[PlannedFile]) -> dict[str, Any]:
    """Returns the content of model.safetensors.index.json."""
    weight_map = {out.name: file.name for file in files for written in file.written for out in written.outs}
    total = sum(written.nbytes for file in files for written in file.written)
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def left_out(manifest: Manifest, placed: list[PlacedTensor], ema: bool) -> dict[str, str]:
    """Maps every tensor that is not exported to the reason. Raises UserError."""
    needed = {source_name(each, ema): each.whole for each in placed}
    if is_merged := holds_adapter(manifest.meta) and not any(is_adapter(name) for name in needed):
        needed = {
            name: shape for name, shape in needed.items() if name in manifest.tensors
        }  # the other tensors come from the base model
    reasons = OPTIMIZER_TENSORS | (
        {"master.": "the weights themselves, because their average is exported"}
        if ema
        else {"ema.": "average of the weights"}
    )
    if not any(each.ours.startswith("bias.") for each in placed):
        reasons = reasons | {"bias.": "balance biases, which are 0 in this family, or belong to the base"}
    if is_merged and not ema:
        reasons = reasons | {"master.": "an adapter, added to the weights"}
    rest = {name: _reason(name, reasons) for name in manifest.tensors if name not in needed}
    unfit = [name for name, reason in rest.items() if reason is None]
    unfit += [
        name for name, shape in needed.items() if name not in manifest.tensors or manifest.tensors[name].shape != shape
    ]
    if unfit:
        raise UserError(
            "export.checkpoint",
            manifest.folder,
            f"must contain exactly the model of this configuration; {len(unfit)} tensors do not fit, such as {unfit[0]}",
            "give the run's conf= and model.*",
        )
    return {name: reason for name, reason in rest.items() if reason is not None}


def source_name(placed: PlacedTensor, ema: bool) -> str:
    """Returns the checkpoint tensor with a Hugging Face tensor's values."""
    return "ema." + placed.ours.removeprefix("master.") if ema and placed.ours.startswith("master.") else placed.ours


def _reason(name: str, reasons: dict[str, str]) -> str | None:
    return next((reason for prefix, reason in reasons.items() if name.startswith(prefix)), None)


def fates(files: list[PlannedFile], rest: dict[str, str], ema: bool) -> list[dict[str, Any]]:
    """Returns one row for every written or left out tensor."""
    rows = [
        {
            "tensor": out.name,
            "dtype": out.dtype,
            "shape": list(out.shape),
            "file": file.name,
            "from": source_name(written.placed, ema),
            "first_element": written.placed.start,
            "fate": _fate(written, out),
        }
        for file in files
        for written in file.written
        for out in written.outs
    ]
    return rows + [{"tensor": None, "from": name, "fate": f"left out: {reason}"} for name, reason in rest.items()]


def _fate(written: WrittenTensor, out: ExportTensor) -> str:
    if written.placed.copy:
        return "copy for the MTP module"
    if out.name.endswith(SCALE):
        return "scales of the blocks"
    return {"F8_E4M3": "FP8 blocks", "BF16": "rounded to bf16", "F32": "unchanged"}[out.dtype]


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Formats the rows. Names that differ only in numbers share a line."""
    groups: dict[tuple[str, str, str], int] = {}
    for row in rows:
        source = row["from"].removeprefix("master.")
        if row["tensor"] is None:
            key = ("-", row["fate"], source.split(".")[0] + ".*")
        else:
            key = (_pattern(row["tensor"]), f"{row['dtype']} {row['fate']}", _pattern(source))
        groups[key] = groups.get(key, 0) + 1
    widths = [max(len(key[column]) for key in groups) for column in range(3)]
    return [
        f"{count:7}  {tensor:{widths[0]}}  {source:{widths[2]}}  {fate}"
        for (tensor, fate, source), count in groups.items()
    ]


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def write_json(path: Path, body: Any) -> None:
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
