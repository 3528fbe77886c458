"""Where documents come from: files of several formats, each a stream of (stable id, text).

What a document is:
  text     a file; one over 16 MiB is cut at line ends into several. Binary files (a NUL among the first 8 KiB, git's
           rule) in a folder are left out, and counted in the notes; any other file must be UTF-8.
  jsonl    the string under text_key of each line; plain, .gz or .zst
  parquet  each value of the column text_key
  stdlib   each .py file of Python's own standard library, less site-packages and the library's tests
  docstrings  chats made of those files (train/data/docstring_chats.py)
Documents without text are left out. Which are held out for validation follows from the stable id alone: a hash of the content or, with
data.hold_out_by=name and of stdlib and docstrings, the path relative to the source's root, with the line or row inside it.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from conf.errors import UserError
from conf.schema import CHATS, Config, DataFormat, MixSource
from train.data.chats import CHAT_KEYS, Chat, read_chat
from train.data.docstring_chats import read_docstring_chats
from train.data.hub import open_hub
from train.data.prepare_progress import ReportProgress
from train.data.readers import (
    read_jsonl,
    read_jsonl_records,
    read_parquet,
    read_parquet_records,
    read_text,
    text_key_of,
)
from train.data.source_files import SourceFile, content_id, digest_files, find_files, hash_id, unreadable

JSONL = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".ndjson.gz", ".ndjson.zst", ".json.gz", ".json.zst")
PARQUET = (".parquet",)
STDLIB = "Python's standard library"
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


SHARE = 1 << 20
"""Bytes that a sample takes from a file at least, however many files there are."""


class DocumentSource(Protocol):
    """A stream of documents that can be read again and again."""

    field: str
    """Which key of the configuration it comes from."""
    name: str

    @property
    def size(self) -> int:
        """Bytes on disk, for progress and for sampling."""

    def notes(self) -> list[str]:
        """What the user may want to know, after the documents were read."""

    def digest(self, manifests: Path, progress: ReportProgress) -> str:
        """Hash of the content and of the way it is read."""

    def documents(self) -> Iterator[tuple[str, str]]:
        """Every document that has text: stable id, text."""

    def sample(self, limit: int) -> Iterator[tuple[str, str]]:
        """Documents from all over the source, so that the first `limit` bytes of them stand for all."""


@dataclass
class FileSource:
    """Files of one format."""

    field: str
    name: str
    root: Path
    files: list[SourceFile]
    reader: Callable[[SourceFile], Iterator[tuple[str, Any]]]
    way: str
    """Format and text key, part of the digest."""
    binary: set[str] = field(default_factory=set)
    """Files that were left out, as far as they were read."""

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
    """The parts of the data with the key that each comes from; one part unless there is a mix."""
    data = config.data
    if data.mix:
        return [(source, f"data.mix[{number}].path") for number, source in enumerate(data.mix)]
    return [(MixSource(data.path or "", 1.0, data.format, data.text_key), "data.path")]


def open_source(source: MixSource, key: str, by_content: bool = False) -> DocumentSource:
    """Find the files of a source. by_content: see data.hold_out_by. Raises UserError when there is no data or the format is unclear."""
    kind = format_of(source, key)
    assert kind not in CHATS, "open_chats has those"
    if kind in (DataFormat.text, DataFormat.stdlib) and source.text_key != "text":
        rule = f"names a field, and {source.path or STDLIB} is read as plain text, each file a document"
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
        raise UserError(key, source.path, f"holds no {kind} files", "check the path")
    way = kind if kind == DataFormat.text else f"{kind}:{text_key}"

    def read(file: SourceFile) -> Iterator[tuple[str, str]]:
        return ((content_id(name, text), text) for name, text in reader(file))

    return FileSource(
        key, source.path, root, files, read if by_content else reader, way + ":content" * by_content, binary
    )


def open_chats(source: MixSource, key: str, way: str, by_content: bool = False) -> FileSource:
    """Find the files of a source of chats; its documents are `Chat`s. way: what else decides their tokens. by_content: see
    data.hold_out_by.
    """
    if source.path.startswith("hf://"):
        rule, cure = (
            "is on the Hugging Face Hub, and chats are read of files",
            "fetch its Parquet files, and give their folder",
        )
        raise UserError(key, source.path, rule, cure)
    if not source.path:
        return replace(_stdlib(key), reader=lambda file: read_docstring_chats(file, key), way=f"docstrings:{way}")
    root = Path(source.path).expanduser()
    files = [file for file in find_files(root, key) if file.name.endswith((*JSONL, ".json", *PARQUET))]
    if not files:
        raise UserError(key, source.path, "holds no .jsonl or .parquet files", "check the path")

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
    """A record's chat as one text, whatever the order of its keys, and the same of JSONL and of Parquet, which knows no absent key."""

    def without_null(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_null(one) for key, one in value.items() if one is not None}
        return [without_null(one) for one in value] if isinstance(value, list) else value

    return json.dumps(
        without_null({key: record[key] for key in CHAT_KEYS if key in record}), sort_keys=True, default=str
    )


def no_text(source: DocumentSource) -> UserError:
    return UserError(source.field, source.name, "; ".join(["holds no text", *source.notes()]), "check the path")


def format_of(source: MixSource, key: str) -> DataFormat:
    """The format that was set, or that the names tell; with a path, stdlib means auto."""
    if not source.path:
        return DataFormat.stdlib
    return _guess(source, key) if source.format in (DataFormat.auto, DataFormat.stdlib) else source.format


def _stdlib(key: str) -> FileSource:
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in find_files(root, key, NOT_STDLIB) if file.name.endswith(".py")]
    if not files:
        raise UserError(
            key, root, "this Python comes without the source of its library", "set data.path=FOLDER_OR_FILE"
        )
    return FileSource(key, STDLIB, root, files, lambda file: read_text(file, key, None), "text")


def _guess(source: MixSource, key: str) -> DataFormat:
    """The format that the names tell."""
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
            f"holds {names} files: which to read is unclear",
            f"set {key.removesuffix('path')}format to one of {names}; the other files are then left out (text reads all)",
        )
    return kinds.pop() if kinds else DataFormat.text


def _kind(name: str) -> DataFormat:
    if name.endswith(JSONL):
        return DataFormat.jsonl
    return DataFormat.parquet if name.endswith(PARQUET) else DataFormat.text
