"""Defines the files of a checkpoint folder and verifies them. Imports no torch, because the driver uses it.

    checkpoints/step_00001234/
        rank_00000.safetensors    rank 0's intervals: 1-D tensors in the safetensors format
        rank_00000.json           its index: the place of each interval, and a CRC-32 for every block of the data
        ...
        manifest.json             written last: meta, the size of every file, the CRC-32 of every index, and for
                                  each logical tensor its dtype, shape and intervals [rank, start, count]

There are two verifications:
- fast: the manifest and the file sizes. It detects crashes, full disks and partial copies.
- full: all bytes

A run uses only checked bytes. Nothing is pickled, so an untrusted checkpoint cannot run code.
"""

import json
import math
import os
import re
import zlib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.run_files import MANIFEST, STEP_FOLDERS, Age, data_name, index_name
from conf.disk import cure_of_reading
from conf.errors import UserError
from conf.words import one_line

FORMAT = "sluice checkpoint"
CHECKPOINT_VERSION = 1
"""Version of the format. An incompatible change increases it."""
CRC_BLOCK = 4 << 20
"""Bytes that one CRC-32 covers: a multiple of every element size."""
LARGEST_NUMBER = 2**63 - 1
"""Largest integer that a checkpoint may contain."""
HOOK_STATE = "hook."
"""Prefix of the names of callbacks' tensors and meta entries."""
META = {
    **dict.fromkeys(("step", "samples", "skipped", "updates", "seed", "seq_len"), int),
    **dict.fromkeys(("tokenizer", "data"), str),
    "has_ema": bool,
    "held_out": dict,
    "config": dict,
}
"""Types of the meta entries that Sluice reads. An int must not be negative."""


class CheckpointDamaged(UserError):
    """A Sluice checkpoint is damaged. resume=auto uses the previous checkpoint instead."""

    def __init__(self, file: Path, problem: str | OSError):
        if isinstance(problem, OSError):
            rule = f"cannot be read: {problem.strerror or problem}"
            cure = f"{cure_of_reading(problem)}; or use another checkpoint, as resume=auto does"
        else:
            rule, cure = f"is damaged: {problem}", "use another checkpoint; resume=auto skips damaged checkpoints"
        super().__init__("checkpoint", file, rule, cure)

    @property
    def line(self) -> str:
        """The damaged file and its problem, on one line."""
        return f"{one_line(self.value)} {self.rule}"


class Meta(dict[str, Any]):
    """Stored values besides tensors. A missing or wrong entry raises CheckpointDamaged."""

    def __init__(self, path: Path, stored: dict[str, Any]):
        """path: the file that `stored` was read from; errors name it. stored: the entries by name."""
        super().__init__(stored)
        self._path = path

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise CheckpointDamaged(self._path, f"its meta lacks {name!r}")
        value = super().__getitem__(name)
        kind = META.get(name, object)
        if not isinstance(value, kind) or (isinstance(value, int) and kind is int and not 0 <= value <= LARGEST_NUMBER):
            raise CheckpointDamaged(self._path, f"its meta has {name} = {value!r:.100}")
        return value


@dataclass(frozen=True)
class Entry:
    """One logical tensor; the ranks' files contain its intervals."""

    dtype: str
    """Element type in the safetensors format, such as F32 or BF16."""
    shape: tuple[int, ...]
    intervals: list[tuple[int, int, int]]
    """Intervals of the flattened tensor, sorted by start: (rank, start, count)."""


@dataclass(frozen=True)
class Manifest:
    """The manifest of one checkpoint, with a correct checksum."""

    folder: Path
    step: int
    attempt: int
    world_size: int
    meta: Meta
    """Values besides tensors: samples, tokenizer, data, seed, config, ..."""
    files: dict[str, list[int]]
    """Maps each file name to [size in bytes]; the name of an index maps to [size in bytes, CRC-32]."""
    tensors: dict[str, Entry] = field(repr=False)

    @property
    def age(self) -> Age:
        return Age(self.attempt, self.step)

    def body(self) -> dict[str, Any]:
        """Returns the manifest as JSON values for `manifest_of`."""
        tensors = {name: (entry.dtype, entry.shape, entry.intervals) for name, entry in self.tensors.items()}
        return {**vars(self), "folder": str(self.folder), "tensors": tensors}


def holds_adapter(meta: dict[str, Any]) -> bool:
    """Whether the checkpoint with this meta contains only an adapter."""
    return "base" in meta


def seal(body: dict[str, Any]) -> str:
    """Returns `body` as JSON text, with its CRC-32 as the last key."""
    return json.dumps({**body, "crc32": zlib.crc32(json.dumps(body).encode())})


def read_manifest(folder: Path) -> Manifest:
    """Reads a checkpoint's manifest. Raises CheckpointDamaged or another UserError."""
    path = folder / MANIFEST
    ours = re.fullmatch(r"step_\d{8,}", folder.name) is not None
    if not folder.is_dir():
        raise _foreign(folder, "is a file" if folder.exists() else "does not exist")
    if not path.is_file():
        raise CheckpointDamaged(path, "the file is missing") if ours else _foreign(folder, f"has no {MANIFEST}")
    try:
        body = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(path, f"not valid JSON ({error})") from None
    except OSError as error:
        raise CheckpointDamaged(path, error) from None
    if not isinstance(body, dict) and ours:
        raise CheckpointDamaged(path, "not a JSON object")
    if not (isinstance(body, dict) and (ours or body.get("format") == FORMAT)):
        raise _foreign(folder, f"has a {MANIFEST} without format = {FORMAT}")
    if body.pop("crc32", None) != zlib.crc32(json.dumps(body).encode()):
        raise CheckpointDamaged(path, "its checksum does not match")
    if _field(path, body, "version", int) > CHECKPOINT_VERSION:
        raise UserError(
            "resume",
            folder,
            f"has format version {body['version']}, newer than {CHECKPOINT_VERSION}, the newest version that this code reads",
            "resume with the code version that wrote it, or with a later version",
        )
    return manifest_of(folder, body)


def manifest_of(folder: Path, body: dict[str, Any]) -> Manifest:
    """Builds a manifest from a result of `merge_indexes`. Raises CheckpointDamaged."""
    path = folder / MANIFEST
    step, attempt, ranks = (_field(path, body, name, int) for name in ("step", "attempt", "world_size"))
    meta, files, tensors = (_field(path, body, name, dict) for name in ("meta", "files", "tensors"))
    if not (0 < ranks <= len(files) and _are_counts([step, attempt])):
        raise CheckpointDamaged(
            path, f"says step {step} of attempt {attempt} by {ranks} ranks, with {len(files)} files"
        )
    for name in (name for rank in range(ranks) for name in (data_name(rank), index_name(rank))):
        if not _are_counts(files.get(name), 2 if name.endswith(".json") else 1):
            raise CheckpointDamaged(path, f"does not contain the size of {name}")
    return Manifest(folder, step, attempt, ranks, Meta(path, meta), files, _entries(path, tensors, ranks))


def _entries(path: Path, tensors: dict[str, Any], ranks: int) -> dict[str, Entry]:
    found = {}
    for name, entry in tensors.items():
        match entry:
            case [str(dtype), shape, [*intervals]] if _are_counts(shape) and all(_are_counts(i, 3) for i in intervals):
                found[name] = Entry(dtype, tuple(shape), [tuple(interval) for interval in intervals])
            case _:
                raise CheckpointDamaged(path, f"does not contain the position of {name}")
        size = math.prod(shape)
        for rank, start, count in intervals:
            if rank >= ranks or start + count > size:
                where = f"{count} elements of {name} from {start} on in rank {rank}'s file"
                raise CheckpointDamaged(path, f"places {where}, and {name} has {size} in the files of {ranks} ranks")
    return found


def _are_counts(found: Any, length: int | None = None) -> bool:
    """Whether `found` is a list of non-negative integers, of this length."""
    listed = isinstance(found, list | tuple) and length in (None, len(found))
    return listed and all(isinstance(count, int) and 0 <= count <= LARGEST_NUMBER for count in found)


def _field(path: Path, body: dict[str, Any], name: str, kind: type) -> Any:
    """Returns a field of the body. Raises CheckpointDamaged for another type."""
    if name not in body:
        raise CheckpointDamaged(path, f"holds no {name!r}")
    if not isinstance(body[name], kind) or isinstance(body[name], bool):
        raise CheckpointDamaged(
            path, f"{name} must be {'a number' if kind is int else 'an object'}, not {body[name]!r}"[:200]
        )
    return body[name]


def read_index(manifest: Manifest, rank: int) -> dict[str, Any]:
    """Reads the index of one rank's data file. Raises CheckpointDamaged."""
    path = manifest.folder / index_name(rank)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointDamaged(path, "the file is missing") from None
    except OSError as error:
        raise CheckpointDamaged(path, error) from None
    return check_index(manifest, rank, text)


def check_index(manifest: Manifest, rank: int, text: bytes) -> dict[str, Any]:
    """Parses an index and compares it with the manifest. Raises CheckpointDamaged."""
    path = manifest.folder / index_name(rank)
    if [len(text), zlib.crc32(text)] != manifest.files[path.name]:
        raise CheckpointDamaged(path, "its checksum does not match the manifest's")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(path, f"not valid JSON ({error})") from None
    match body:
        case {
            "header_bytes": int(),
            "header_crc32": int(),
            "data_bytes": int(size),
            "blocks_crc32": [*blocks],
            "tensors": {**tensors},
        } if len(blocks) == -(-size // CRC_BLOCK) and all(map(_is_place, tensors.values())):
            return body
    raise CheckpointDamaged(path, "does not describe its data file")


def _is_place(found: Any) -> bool:
    match found:
        case [str(), shape, int(), int(), int()] if _are_counts(shape):
            return True
    return False


def verify(folder: Path, full: bool = False) -> list[str]:
    """Returns the problems of a checkpoint's files. full: read every byte."""
    try:
        return _problems(read_manifest(folder), full)
    except CheckpointDamaged as error:
        return [error.line]


def _problems(manifest: Manifest, full: bool) -> list[str]:
    problems = [problem.line for name in manifest.files if (problem := _wrong_size(manifest, name))]
    if full and not problems:
        for rank in range(manifest.world_size):
            try:
                check_data(manifest, rank)
            except CheckpointDamaged as error:
                problems.append(error.line)
    return problems


def check_data(manifest: Manifest, rank: int) -> None:
    """Read and check one rank's data file. Raises CheckpointDamaged."""
    index = read_index(manifest, rank)
    path = manifest.folder / data_name(rank)
    try:
        with open(path, "rb") as file:
            if zlib.crc32(file.read(index["header_bytes"])) != index["header_crc32"]:
                raise CheckpointDamaged(path, "the checksum of its header does not match")
            for number, crc in enumerate(index["blocks_crc32"]):
                if zlib.crc32(file.read(CRC_BLOCK)) != crc:
                    raise CheckpointDamaged(path, f"the checksum of block {number} does not match")
    except OSError as error:
        raise CheckpointDamaged(path, error) from error


@dataclass(frozen=True)
class FoundCheckpoint:
    """Result of a search for the newest intact checkpoint."""

    manifest: Manifest | None
    warnings: list[str]
    """Problems of damaged checkpoints that may be newer than `manifest`."""

    @property
    def path(self) -> Path | None:
        return None if self.manifest is None else self.manifest.folder


def newest_intact(root: Path, full: bool = False, skip: Collection[Path] = ()) -> FoundCheckpoint:
    """Finds the newest intact checkpoint in `root`. Raises UserError for a newer format."""
    while True:
        warnings: list[str] = []
        for manifest in _newest_first(root, warnings):
            if manifest.folder in skip:
                continue
            problems = _problems(manifest, full)
            if not problems:
                return FoundCheckpoint(manifest, warnings)
            if not os.path.lexists(manifest.folder):  # a live run pruned it: search again
                break
            warnings += problems
        else:
            return FoundCheckpoint(None, warnings)


def checkpoints(root: Path) -> list[Manifest]:
    """Returns the checkpoints that pass the fast verification, newest first."""
    return [manifest for manifest in _newest_first(root, []) if not _problems(manifest, full=False)]


def _newest_first(root: Path, warnings: list[str]) -> list[Manifest]:
    """Returns the undamaged manifests in `root`, newest first. Adds problems to `warnings`."""
    while True:
        sound: list[Manifest] = []
        damaged: list[str] = []
        for folder in root.glob(STEP_FOLDERS):
            try:
                sound.append(read_manifest(folder))
            except UserError as error:
                if not os.path.lexists(folder):  # a live run pruned it: search again
                    break
                if not isinstance(error, CheckpointDamaged):
                    raise
                damaged.append(error.line)
        else:
            warnings += damaged
            return sorted(sound, key=lambda manifest: manifest.age, reverse=True)


def _wrong_size(manifest: Manifest, name: str) -> CheckpointDamaged | None:
    path, size = manifest.folder / name, manifest.files[name][0]
    try:
        found = os.stat(path).st_size
    except FileNotFoundError:
        return CheckpointDamaged(path, "the file is missing")
    except OSError as error:
        return CheckpointDamaged(path, error)
    return None if found == size else CheckpointDamaged(path, f"{found} bytes, but {size} bytes were written")


def _foreign(folder: Path, why: str) -> UserError:
    return UserError(
        "resume",
        folder,
        f"must be a checkpoint folder of Sluice; it {why}",
        "give the path of a folder runs/NAME/checkpoints/step_N, or of the run folder runs/NAME",
    )
