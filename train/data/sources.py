"""Sources of documents: files of several formats, each a stream of (stable id, text).

A document is:
  text     a file in UTF-8; a file over 16 MiB is cut at line ends. Binary files in a folder are left out.
  jsonl    the string under text_key of each line; plain, .gz or .zst
  parquet  each value of the column text_key
  stdlib   each .py file of Python's standard library, without site-packages and the library's tests
  docstrings  a chat made from a docstring in the files of stdlib (train/data/chats.py)

Documents without text are left out. A document's stable id decides whether it is held out. By default, the id is a hash
of the content. With data.hold_out_by=name, and for stdlib and docstrings, it is the path in the source, with the line
or row.
"""

import hashlib
import json
import os
import re
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from conf.disk import cure_of_reading
from conf.errors import UserError
from conf.schema import CHATS, Config, DataFormat, MixSource
from train.data.chats import CHAT_KEYS, Chat, read_chat, read_docstring_chats, without_nulls
from train.data.prepare_progress import ReportProgress
from train.data.reach import hub, offline_reason
from train.data.readers import (
    SourceFile,
    check_text,
    read_jsonl,
    read_jsonl_records,
    read_parquet,
    read_parquet_records,
    read_text,
    text_key_of,
)
from train.data.token_store import keep_text
from train.program import install_words

JSONL = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".ndjson.gz", ".ndjson.zst", ".json.gz", ".json.zst")
PARQUET = (".parquet",)
STDLIB = "Python's standard library"
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


SHARE = 1 << 20
"""Minimum characters of each file in a tokenizer's training sample."""


class DocumentSource(Protocol):
    """A stream of documents that can be read repeatedly."""

    field: str
    """Configuration key of the source."""
    name: str

    @property
    def size(self) -> int:
        """Bytes on disk, for the progress display and for sampling."""

    def notes(self) -> list[str]:
        """Notes for the user, available after the documents were read."""

    def digest(self, manifests: Path, progress: ReportProgress) -> str:
        """Returns the hash of the source's content and settings."""

    def documents(self) -> Iterator[tuple[str, str]]:
        """Yields stable id and text of every document with text."""

    def sample(self, limit: int) -> Iterator[tuple[str, str]]:
        """Yields documents. The first ones, about `limit` bytes together, are a sample of the whole source."""


@dataclass
class FileSource:
    """Files of one format."""

    field: str
    name: str
    root: Path
    files: list[SourceFile]
    reader: Callable[[SourceFile], Iterator[tuple[str, Any]]]
    way: str
    """Settings of the reader (format and text key), for the digest."""
    binary: set[str] = field(default_factory=set)
    """Names of the binary files that were left out. The set is complete when all files have been read."""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def notes(self) -> list[str]:
        return [f"{self.name}: left out {len(self.binary)} binary files"] if self.binary else []

    def digest(self, manifests: Path, progress: ReportProgress) -> str:
        name = hashlib.blake2b(os.fsencode(self.root.absolute()) + self.way.encode(), digest_size=16).hexdigest()
        return f"{self.way}:{digest_files(self.files, manifests / f'{name}.json', self.field, progress)}"

    def documents(self) -> Iterator[tuple[str, str]]:
        for file in self.files:
            yield from self._read(file)

    def sample(self, limit: int) -> Iterator[tuple[str, str]]:
        share = max(SHARE, limit // len(self.files)) if self.size > limit else self.size
        for file in sorted(self.files, key=lambda file: hash_id(file.name)):
            taken = 0
            for name, text in self._read(file):
                yield name, text
                taken += len(text)
                if taken >= share:
                    break

    def _read(self, file: SourceFile) -> Iterator[tuple[str, str]]:
        try:
            yield from ((name, text) for name, text in self.reader(file) if text)
        except OSError as error:
            raise unreadable(error, self.field, file.path) from error


def sources_of(config: Config) -> list[tuple[MixSource, str]]:
    """Returns the sources of the data, each with its configuration key."""
    data = config.data
    if data.mix:
        return [(source, f"data.mix[{number}].path") for number, source in enumerate(data.mix)]
    return [(MixSource(data.path or "", 1.0, data.format, data.text_key), "data.path")]


def open_source(source: MixSource, key: str, by_content: bool = False) -> DocumentSource:
    """Find the files of a source. Raises UserError."""
    kind = format_of(source, key)
    assert kind not in CHATS, "open_chats has those"
    if kind in (DataFormat.text, DataFormat.stdlib) and source.text_key != "text":
        rule = f"names a field, and {source.path or STDLIB} is read as plain text, one document per file"
        cure = f"leave it out, or set {key.removesuffix('path')}format to jsonl or parquet"
        raise UserError(text_key_of(key), source.text_key, rule, cure)
    if kind == DataFormat.stdlib:
        return _stdlib(key)
    if kind == DataFormat.huggingface:
        return open_hub(source.path, source.text_key, key, by_content)
    root, text_key, binary = Path(source.path).expanduser(), source.text_key, set()
    suffixes, reader = {
        DataFormat.text: (None, lambda file: read_text(file, key, binary if root.is_dir() else None)),
        DataFormat.jsonl: ((*JSONL, ".json"), lambda file: read_jsonl(file, text_key, key)),
        DataFormat.parquet: (PARQUET, lambda file: read_parquet(file, text_key, key)),
    }[kind]
    files = find_files(root, key)
    if suffixes and root.is_dir():
        files = [file for file in files if file.name.endswith(suffixes)]
    if not files:
        raise UserError(key, source.path, f"has no {kind} files", "check the path")
    way = kind if kind == DataFormat.text else f"{kind}:{text_key}"

    def read(file: SourceFile) -> Iterator[tuple[str, str]]:
        return ((content_id(name, text), text) for name, text in reader(file))

    return FileSource(
        key, source.path, root, files, read if by_content else reader, way + ":content" * by_content, binary
    )


def open_chats(source: MixSource, key: str, way: str, by_content: bool = False) -> FileSource:
    """Find the files of a chat source. way: the settings that change the tokens, as text for the hash."""
    if source.path.startswith("hf://"):
        rule, cure = (
            "is on the Hugging Face Hub, and chats must be files",
            "download its Parquet files, and give their folder",
        )
        raise UserError(key, source.path, rule, cure)
    if not source.path:
        return replace(_stdlib(key), reader=lambda file: read_docstring_chats(file, key), way=f"docstrings:{way}")
    root = Path(source.path).expanduser()
    files = [file for file in find_files(root, key) if file.name.endswith((*JSONL, ".json", *PARQUET))]
    if not files:
        raise UserError(key, source.path, "has no .jsonl or .parquet files", "check the path")

    def read(file: SourceFile) -> Iterator[tuple[str, Chat]]:
        records = (
            read_parquet_records(file, key, lambda names: [name for name in CHAT_KEYS if name in names])
            if file.name.endswith(PARQUET)
            else read_jsonl_records(file, key)
        )
        for name, place, record in records:
            chat = read_chat(record, place, key)
            yield content_id(name, _canonical(record)) if by_content else name, chat

    return FileSource(key, source.path, root, files, read, f"chat:{way}" + ":content" * by_content)


def _canonical(record: Any) -> str:
    """Returns a record's chat as JSON text, with sorted keys and without nulls."""
    return json.dumps(
        without_nulls({key: record[key] for key in CHAT_KEYS if key in record}), sort_keys=True, default=str
    )


def no_text(source: DocumentSource) -> UserError:
    return UserError(source.field, source.name, "; ".join(["has no text", *source.notes()]), "check the path")


def format_of(source: MixSource, key: str) -> DataFormat:
    """Returns the configured format, or the format that file names show."""
    if not source.path:
        return DataFormat.stdlib
    return _guess(source, key) if source.format in (DataFormat.auto, DataFormat.stdlib) else source.format


def _stdlib(key: str) -> FileSource:
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in find_files(root, key, NOT_STDLIB) if file.name.endswith(".py")]
    if not files:
        raise UserError(
            key, root, "this Python has no source files of its standard library", "set data.path=FOLDER_OR_FILE"
        )
    return FileSource(key, STDLIB, root, files, lambda file: read_text(file, key, None), "text")


def _guess(source: MixSource, key: str) -> DataFormat:
    """Returns the format that the file names show."""
    path = Path(source.path).expanduser()
    if (
        source.path.startswith("hf://")
        or (path / "dataset_info.json").is_file()
        or (path / "dataset_dict.json").is_file()
    ):
        return DataFormat.huggingface
    if (path / "tokens.bin").is_file() and (path / "meta.json").is_file():
        return DataFormat.memmap
    kinds = {_kind(file.name) for file in find_files(path, key)}
    if len(kinds) > 1:
        names = " and ".join(sorted(kinds))
        raise UserError(
            key,
            source.path,
            f"has {names} files, and the choice is ambiguous",
            f"set {key.removesuffix('path')}format to one of {names}; the other files are then left out (text reads all)",
        )
    return kinds.pop() if kinds else DataFormat.text


def _kind(name: str) -> DataFormat:
    if name.endswith(JSONL):
        return DataFormat.jsonl
    return DataFormat.parquet if name.endswith(PARQUET) else DataFormat.text


# Hugging Face datasets through the optional package `datasets`: hf://NAME[@CONFIG][:SPLIT]; the default split is
# `train`.
#
# NAME is a dataset of the hub, a folder saved with save_to_disk, or a folder that load_dataset can read.

HUB_ROWS = 256


@dataclass
class HubSource:
    """One split of a dataset; each row's text is a document."""

    field: str
    name: str
    split: str
    text_key: str
    table: Any
    """The dataset, a datasets.Dataset."""
    by_content: bool
    """Whether content, instead of the row number, decides what is held out."""

    @property
    def size(self) -> int:
        return int(self.table.data.nbytes)

    def notes(self) -> list[str]:
        return []

    def digest(self, manifests: Path, progress: ReportProgress) -> str:
        way = f"{self.text_key}:content" if self.by_content else self.text_key
        return f"huggingface:{way}:{self.table._fingerprint}:{len(self.table)}"

    def documents(self) -> Iterator[tuple[str, str]]:
        yield from self._read(1)

    def sample(self, limit: int) -> Iterator[tuple[str, str]]:
        yield from self._read(max(1, self.size // limit))

    def _read(self, step: int) -> Iterator[tuple[str, str]]:
        """Yields every step-th row, with its stable id."""
        rows = range(0, len(self.table), step)
        table = self.table if step == 1 else self.table.select(rows)
        for first, batch in zip(range(0, len(rows), HUB_ROWS), table.with_format("arrow").iter(HUB_ROWS), strict=True):
            for row, value in zip(rows[first : first + HUB_ROWS], batch.column(self.text_key).to_pylist(), strict=True):
                name = f"{self.split}:{row}"
                if text := check_text(value, f"{self.name} {name}", self.text_key, self.field):
                    yield content_id(name, text) if self.by_content else name, text


def open_hub(path: str, text_key: str, key: str, by_content: bool = False) -> HubSource:
    """Load the dataset split that `path` names. Raises UserError."""
    match = re.fullmatch(r"(?:hf://)?(.+?)(?:@([^@:/]+))?(?::([^:/]+))?", path)
    if match is None:
        raise UserError(key, path, "must be hf://NAME[@CONFIG][:SPLIT]", "write it in this form")
    name, config, split = match[1], match[2], match[3] or "train"
    folder = Path(name).expanduser()
    offline = None if folder.is_dir() else offline_reason()
    try:
        import datasets
    except ImportError as error:
        rule = "needs the Python package datasets, which is not installed"
        raise UserError(key, path, rule, f"{install_words('datasets')}; or use files") from error
    try:
        if any((folder / mark).is_file() for mark in ("dataset_info.json", "dataset_dict.json")):
            table = datasets.load_from_disk(folder)
            table = table[split] if isinstance(table, datasets.DatasetDict) else table
        else:
            table = datasets.load_dataset(str(folder) if folder.is_dir() else name, config, split=split)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        cure = "check name, @CONFIG and :SPLIT; without a network use files, or a folder of save_to_disk"
        if offline is not None:
            reason = f"{hub()} cannot be reached ({offline}), and the dataset is not in the cache of this machine"
        raise UserError(key, path, f"cannot be loaded: {reason}", cure) from error
    if text_key not in table.column_names:
        rule = f"has no column {text_key!r}, only: {', '.join(table.column_names[:20])}"
        raise UserError(key, path, rule, f"set {text_key_of(key)} to the column of the text")
    return HubSource(key, path, split, text_key, table, by_content)


# Finds the files of a source, in the order of their paths, and hashes changed files.
#
# Names that begin with a dot, and links to folders, are left out.

HASHED_BYTES = 8 << 20
RACE = 10**9 * 2
"""The hash of a file is not stored if the file changed less than this number of nanoseconds ago."""


def find_files(root: Path, field: str, skip_folders: frozenset[str] = frozenset()) -> list[SourceFile]:
    """Returns the file `root`, or the files under it. Raises UserError."""
    try:
        if root.is_file():
            return [_file(root, root.name)]
        if not root.is_dir():
            raise UserError(
                field,
                root,
                "no such file or folder",
                f"check the path, or set {field}=PATH to the place of the text",
            )
        found = []
        for folder, folders, names in os.walk(root, onerror=_raise):
            folders[:] = [name for name in folders if name[0] != "." and name not in skip_folders]
            paths = [Path(folder, name) for name in names if name[0] != "."]
            found += [_file(path, path.relative_to(root).as_posix()) for path in paths if path.is_file()]
    except OSError as error:
        raise unreadable(error, field, error.filename or root) from error
    return sorted(found, key=lambda file: file.name)


def unreadable(error: OSError, field: str, path: Path | str) -> UserError:
    """Builds the UserError for an unreadable data file."""
    return UserError(field, path, f"cannot be read: {error.strerror or error}", cure_of_reading(error))


def _file(path: Path, name: str) -> SourceFile:
    status = path.stat()
    return SourceFile(path, name, status.st_size, status.st_mtime_ns)


def _raise(error: OSError) -> None:
    raise error


def content_id(place: str, content: str) -> str:
    """Returns a stable id: the document's path (with its line or row), and the hash of its content."""
    return f"{place}\0{hashlib.blake2b(content.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}"


def place_of(name: str) -> str:
    """Returns the document's path (with its line or row) from its stable id."""
    return name.partition("\0")[0]


def hash_id(name: str) -> int:
    """Returns the hash of a stable id, which decides what is held out."""
    name = name.rpartition("\0")[2]
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def digest_files(files: list[SourceFile], manifest: Path, field: str, progress: ReportProgress) -> str:
    """Returns the hash of names and contents. Reads only changed files."""
    known = _read_manifest(manifest)
    changed = [file for file in files if known.get(file.name, [])[:2] != [file.size, file.modified]]
    total, done = sum(file.size for file in changed), 0
    fresh: dict[str, list] = {}
    for file in changed:
        fresh[file.name] = [
            file.size,
            file.modified,
            _digest(file, field, lambda more: progress("reading", more, total), done),
        ]
        done += file.size
    entries = {file.name: fresh.get(file.name) or known[file.name] for file in files}
    if changed:
        settled = time.time_ns() - RACE
        kept = {name: entry for name, entry in entries.items() if entry[1] < settled}
        keep_text(manifest, json.dumps(kept))
    return hashlib.blake2b(
        json.dumps([[name, entry[2]] for name, entry in entries.items()]).encode(), digest_size=16
    ).hexdigest()


def _read_manifest(path: Path) -> dict[str, list]:
    """Returns the content of the manifest; empty if missing or damaged."""
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _digest(file: SourceFile, field: str, progress: Callable[[int], None], done: int) -> str:
    """Returns a file's hash. Calls `progress` with the bytes read so far, including `done` (bytes of earlier files)."""
    whole = hashlib.blake2b(digest_size=16)
    try:
        with file.path.open("rb") as stream:
            while chunk := stream.read(HASHED_BYTES):
                whole.update(chunk)
                done += len(chunk)
                progress(done)
    except OSError as error:
        raise unreadable(error, field, file.path) from error
    return whole.hexdigest()
