"""Tokens on disk: the cache of tokenised data, and the `memmap` format that other programs may write.

A token folder contains
  tokens.bin      all documents one after another, little-endian uint16 or uint32, without eos
  documents.npy   int64 (D + 1): document d is tokens[documents[d] : documents[d + 1]]
  hashes.npy      uint64 (D): hash of each document's stable id, which decides whether it is held out
  supervised.bin  only for chats: one byte per token, 1 if the loss includes its prediction, otherwise 0
  tokenizer.json  the tokenizer that made the tokens
  meta.json       version, dtype, tokens, documents, text_bytes, tokenizer (fingerprint), crc32 of each file

Opening a folder compares the sizes and checksums of its files with meta.json. A large tokens.bin is not checked again
while its size and mtime are unchanged.

D = documents, N = tokens.
"""

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conf.disk import FULL, REFUSED, cure_of_writing, describe_room, is_refusal, reading, size_in_words
from conf.errors import UserError
from conf.files import atomic_write_text, open_lock

STORE_VERSION = 1
ALWAYS_CHECKED = 64 << 20
"""Maximum bytes of a tokens.bin that is checked at every start."""
COPIED_BYTES = 8 << 20


class DamagedStore(Exception):
    """A token folder is damaged; the message names the part."""


@dataclass(frozen=True)
class TokenStore:
    """An open token folder."""

    path: Path
    tokens_N: np.ndarray
    """Token ids of all documents (uint16 or uint32), memory-mapped."""
    offsets_D1: np.ndarray
    hashes_D: np.ndarray
    meta: dict[str, Any]
    largest_id: int
    supervised_N: np.ndarray | None = None
    """uint8, memory-mapped: 1 for learnt tokens. None: all are learnt."""


@contextmanager
def space_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Returns a context manager that turns disk errors into a UserError. needed: number of bytes to write."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            more = f", about {size_in_words(needed)} are needed" if needed else ""
            rule = f"no space left on this disk: {describe_room(path)}{more}"
        elif error.errno in REFUSED | {errno.EEXIST, errno.ENOENT}:
            rule = f"cannot be written: {error.strerror}"
        else:
            raise
        cure = f"{cure_of_writing(error)}, or set data.cache (or SLUICE_CACHE) to a folder of your own on another disk"
        raise UserError("data.cache", path, rule, cure) from error


def keep_text(path: Path, text: str) -> None:
    """Write a small cache file atomically."""
    with space_errors(path.parent, len(text)):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, text, durable=False)


@contextmanager
def locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Returns a context manager that holds the lock of a cache entry. Calls `waiting` before it waits for another
    process.

    With the lock, it removes unfinished files of dead processes.
    """
    lock = path.with_name(f".{path.name}.lock")
    with space_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open_lock(lock)
    with open(handle, "ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(stream, fcntl.LOCK_EX)
        for stale in path.parent.glob(f".{path.name}.*"):
            if stale != lock:
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        yield


class StoreWriter:
    """Writes a token folder, completely or not at all, as a context manager."""

    def __init__(
        self,
        path: Path,
        vocab_size: int,
        tokenizer_json: str,
        fingerprint: str,
        expected: int = 0,
        supervised: bool = False,
    ):
        """expected: estimated bytes of text. supervised: whether `append` gets masks."""
        self.path, self.expected = path, expected
        self._masks: list[np.ndarray] | None = [] if supervised else None
        self.more: dict[str, Any] = {}
        """Additional entries of meta.json."""
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.tokenizer_json, self.fingerprint = tokenizer_json, fingerprint
        self.lengths: list[np.ndarray] = []
        self.hashes: list[np.ndarray] = []
        self.tokens = self.text_bytes = self.crc = 0

    def __enter__(self) -> "StoreWriter":
        self._temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}")
        with space_errors(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._temporary.mkdir()
            self._stream = (self._temporary / "tokens.bin").open("wb")
        return self

    def append(
        self,
        ids_N: np.ndarray,
        lengths_D: np.ndarray,
        hashes_D: np.ndarray,
        text_bytes: int,
        continues: bool = False,
        supervised_N: np.ndarray | None = None,
    ) -> None:
        """Add documents. Documents without tokens are left out. ids_N: tokens of all documents, concatenated.

        continues: whether the first document continues the last document of the previous call. supervised_N: uint8,
        1 for learnt tokens.
        """
        raw = ids_N.astype(self.dtype).tobytes()
        with space_errors(self.path.parent, self._needed(len(raw))):
            self._stream.write(raw)
        self.crc = zlib.crc32(raw, self.crc)
        if continues:
            self.lengths[-1][-1] += lengths_D[0]
            lengths_D, hashes_D = lengths_D[1:], hashes_D[1:]
        if len(lengths_D):  # an empty list would hide the last document from `continues`
            self.lengths.append(lengths_D)
            self.hashes.append(hashes_D)
        self.tokens += len(ids_N)
        self.text_bytes += text_bytes
        if self._masks is not None:
            assert supervised_N is not None and len(supervised_N) == len(ids_N)
            self._masks.append(supervised_N)

    def _needed(self, more: int = 0) -> int:
        """Estimates the bytes that all tokens will need on disk.

        more: bytes of tokens that `tokens` does not count yet.
        """
        there = self.tokens * self.dtype.itemsize + more
        return round(there * max(1.0, self.expected / self.text_bytes)) if self.text_bytes else there

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            with space_errors(self.path.parent, self._needed()):
                if kind is None:
                    self._finish()
                self._stream.close()
                if kind is None:
                    self._publish()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _finish(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        lengths_D, hashes_D = np.concatenate(self.lengths), np.concatenate(self.hashes)
        offsets_D1 = np.concatenate([[0], lengths_D[lengths_D > 0]]).cumsum().astype("<i8")
        _save(self._temporary / "documents.npy", offsets_D1)
        _save(self._temporary / "hashes.npy", hashes_D[lengths_D > 0].astype("<u8"))
        (self._temporary / "tokenizer.json").write_text(self.tokenizer_json, encoding="utf-8")
        names = ["documents.npy", "hashes.npy", "tokenizer.json"]
        if self._masks is not None:
            (self._temporary / "supervised.bin").write_bytes(np.concatenate(self._masks).astype(np.uint8).tobytes())
            names.append("supervised.bin")
        checksums = {name: zlib.crc32((self._temporary / name).read_bytes()) for name in names}
        meta = {
            "version": STORE_VERSION,
            "dtype": self.dtype.name,
            "tokens": self.tokens,
            "documents": len(offsets_D1) - 1,
            "text_bytes": self.text_bytes,
            "tokenizer": self.fingerprint,
            "crc32": {"tokens.bin": self.crc, **checksums},
            **self.more,
        }
        (self._temporary / "meta.json").write_text(json.dumps(meta, indent=1))

    def _publish(self) -> None:
        if self.path.exists():  # move a damaged folder away at once: a reader may use it
            old = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}")
            os.rename(self.path, old)
            shutil.rmtree(old, ignore_errors=True)
        os.rename(self._temporary, self.path)


def _save(path: Path, array: np.ndarray) -> None:
    """Save an array. A full disk raises an OSError with errno."""
    content = io.BytesIO()
    np.save(content, array)
    path.write_bytes(content.getbuffer())


def open_store(path: Path, marks: Path) -> TokenStore:
    """Open and check a token folder. Raises DamagedStore or OSError."""
    with reading(path):
        return _open(path, marks)


def _open(path: Path, marks: Path) -> TokenStore:
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        dtype, count, documents = np.dtype(meta["dtype"]), int(meta["tokens"]), int(meta["documents"])
        offsets_D1 = np.load(path / "documents.npy")
        hashes_D = np.load(path / "hashes.npy")
        stored = (path / "tokens.bin").stat().st_size
    except (OSError, ValueError, KeyError, TypeError, EOFError, OverflowError, RecursionError) as error:
        if is_refusal(error):
            raise
        raise DamagedStore(f"{type(error).__name__}: {error}") from error
    if meta.get("version") != STORE_VERSION or dtype not in (np.uint16, np.uint32):
        raise DamagedStore(f"meta.json has version {meta.get('version')} and dtype {dtype}")
    if stored != count * dtype.itemsize or count == 0:
        raise DamagedStore(f"tokens.bin has {stored} bytes, not {count * dtype.itemsize}")
    if not (isinstance(offsets_D1, np.ndarray) and isinstance(hashes_D, np.ndarray)):
        raise DamagedStore("documents.npy or hashes.npy is not a numpy array")
    if not isinstance(meta.get("crc32", {}), dict):
        raise DamagedStore("meta.json has crc32 that is not an object")
    whole = hashes_D.shape == (documents,) and offsets_D1.shape == (documents + 1,) and offsets_D1[0] == 0
    if not whole or offsets_D1[-1] != count or np.any(np.diff(offsets_D1) <= 0):
        raise DamagedStore("documents.npy and hashes.npy do not divide tokens.bin into documents")
    tokens_N = np.asarray(np.memmap(path / "tokens.bin", dtype=dtype.newbyteorder("<"), mode="r"))
    largest = _check_content(path, tokens_N, meta.get("crc32", {}), marks)
    supervised_N = None
    if "supervised.bin" in meta.get("crc32", {}):
        supervised_N = np.asarray(np.memmap(path / "supervised.bin", dtype=np.uint8, mode="r"))
        if len(supervised_N) != count:
            raise DamagedStore(f"supervised.bin has {len(supervised_N)} bytes, not {count}")
    starts_D1, hashes_D = offsets_D1.astype(np.int64), hashes_D.astype(np.uint64)
    return TokenStore(path, tokens_N, starts_D1, hashes_D, meta, largest, supervised_N)


def _check_content(path: Path, tokens_N: np.ndarray, checksums: dict[str, int], marks: Path) -> int:
    """Compare the checksums, unless `marks` records an earlier check. Returns the largest token id."""
    for name in sorted(checksums.keys() - {"tokens.bin"}):
        if not (path / name).is_file() or zlib.crc32((path / name).read_bytes()) != checksums[name]:
            raise DamagedStore(f"{name} does not have the checksum in meta.json")
    status = (path / "tokens.bin").stat()
    where = str(path.absolute())
    now = [where, status.st_size, status.st_mtime_ns, checksums.get("tokens.bin")]
    mark = marks / f"{hashlib.blake2b(where.encode(), digest_size=16).hexdigest()}.json"
    if status.st_size > ALWAYS_CHECKED and (known := _read_mark(mark)) and known[:4] == now:
        return known[4]
    crc = largest = 0
    for first in range(0, len(tokens_N), COPIED_BYTES):
        chunk_N = tokens_N[first : first + COPIED_BYTES]
        crc, largest = zlib.crc32(chunk_N.data, crc), max(largest, int(chunk_N.max()))
    if crc != checksums.get("tokens.bin", crc):
        raise DamagedStore("tokens.bin does not have the checksum in meta.json")
    if status.st_size > ALWAYS_CHECKED:
        keep_text(mark, json.dumps([*now, largest]))
    return largest


def _read_mark(path: Path) -> list | None:
    """Returns the stored result of the last checksum comparison; None if there is none."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
