"""Reads documents (stable id, text) from one file, in pieces. Raises UserError."""

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from conf.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Buffer

TEXT_PIECE_BYTES = 16 << 20
"""Maximum bytes of a text document. A longer file is cut."""
READ_BYTES = 1 << 20
LONGEST_LINE = 128 << 20
"""Maximum bytes of a JSONL line, which may be in memory twice."""
LARGEST_RATIO, FREE = 1000, 1 << 30
"""Maximum decompressed bytes: the larger of FREE and LARGEST_RATIO times the file size."""
ZSTD_INPUT = 4 << 10
"""Compressed bytes per call: 4 bytes of Zstandard can become 128 KiB."""
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class SourceFile:
    path: Path
    name: str
    """Path relative to the source's root, the same on every machine."""
    size: int
    modified: int
    """Time of the last change (mtime) in ns."""


def read_text(file: SourceFile, field: str, binary: set[str] | None) -> Iterator[tuple[str, str]]:
    """Yields the file as one document, or as several if it is longer than TEXT_PIECE_BYTES.

    binary: receives the names of binary files, which yield nothing; None: no check.
    """
    with file.path.open("rb") as stream:
        offset, number, rest = 0, 0, b""
        while True:
            block = rest + stream.read(TEXT_PIECE_BYTES - len(rest))
            if binary is not None and number == 0 and b"\0" in block[:8192]:
                binary.add(file.name)
                return
            last = len(block) < TEXT_PIECE_BYTES
            cut = len(block) if last else _cut(block)
            yield (f"{file.name}#{number}" if number else file.name), _decode(block[:cut], file, offset, field)
            if last:
                return
            offset, number, rest = offset + cut, number + 1, block[cut:]


def _cut(block: bytes) -> int:
    """Returns where to cut `block`: after a line end, or before the last character."""
    line = block.rfind(b"\n", len(block) // 2) + 1
    if line:
        return line
    cut = len(block) - 1
    while cut > len(block) - 4 and block[cut] & 0xC0 == 0x80:  # do not cut before a continuation byte of UTF-8
        cut -= 1
    return cut


def _decode(raw: bytes, file: SourceFile, offset: int, field: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            field,
            file.path,
            f"is not UTF-8: byte {offset + error.start} is 0x{raw[error.start]:02x} ({error.reason})",
            "convert it (iconv -t UTF-8), or move it out of the data",
        ) from error


def read_jsonl(file: SourceFile, text_key: str, field: str) -> Iterator[tuple[str, str]]:
    """Yields one document per line: the string under text_key."""
    for name, place, record in read_jsonl_records(file, field):
        yield name, _text_of(record, text_key, place, field)


def read_jsonl_records(file: SourceFile, field: str) -> Iterator[tuple[str, str, object]]:
    """Yields (stable id, file and line for error messages, value) of each line."""
    offset = number = 0
    for line in read_lines(file, field):
        number, size = number + 1, len(line)
        if line.strip():
            text = _decode(line, file, offset, field)
            text = text.removeprefix("\ufeff") if number == 1 else text  # a byte order mark, which JSON does not allow
            del line  # frees the line, which may be as large as the file
            place = f"{file.path}:{number}"
            yield f"{file.name}:{number}", place, _parse(text, place, field)
        offset += size


def _parse(line: str, place: str, field: str) -> object:
    try:
        return json.loads(line)
    except RecursionError as error:
        raise UserError(field, place, "is JSON with too many nested levels", "remove this line") from error
    except ValueError as error:
        raise UserError(field, place, f"is not JSON: {error}", "correct or remove this line") from error


def _text_of(record: object, text_key: str, place: str, field: str) -> str:
    if not isinstance(record, dict):
        rule = f"must be an object with the text under {text_key!r}, and is a {type(record).__name__}"
        raise UserError(field, place, rule, "write one object per line (jq -c '.[]' does so with a list)")
    if text_key not in record:
        keys = ", ".join(list(record)[:8])
        raise UserError(
            field, place, f"has no key {text_key!r}, only: {keys}", f"set {text_key_of(field)} to the key of the text"
        )
    return check_text(record[text_key], place, text_key, field)


def text_key_of(field: str) -> str:
    """Returns the name of the text_key setting of a source: data.text_key if `field` is data.path."""
    return field.removesuffix("path") + "text_key"


def check_text(value: object, place: str, text_key: str, field: str) -> str:
    """Returns the value as text; null is empty. Raises UserError."""
    if value is None:
        return ""
    if not isinstance(value, str):
        rule = f"has a {type(value).__name__}, not a string, under {text_key!r}"
        raise UserError(field, place, rule, f"set {text_key_of(field)} to the key of the text")
    if found := SURROGATE.search(value):
        rule = f"is not Unicode text: character {found.start()} is a lone surrogate, U+{ord(found[0]):04X}"
        raise UserError(field, place, rule, "correct or remove this line")
    return value


def read_lines(file: SourceFile, field: str) -> Iterator[bytes]:
    """Yields the lines of the file. The suffix of its name decides how the file is decompressed."""
    with file.path.open("rb", buffering=READ_BYTES) as raw:
        if file.name.endswith(".zst"):
            stream = io.BufferedReader(_Zstandard(raw), READ_BYTES)
        else:
            stream = gzip.GzipFile(fileobj=raw) if file.name.endswith(".gz") else raw
        try:
            yield from _bounded(stream.readline, file, field)
        except (EOFError, zlib.error, gzip.BadGzipFile, _BrokenError) as error:
            raise UserError(field, file.path, f"is damaged: {error}", "download or compress it again") from error


def _bounded(readline: Callable[[int], bytes], file: SourceFile, field: str) -> Iterator[bytes]:
    """Yields the lines of a stream. Raises UserError for too much data."""
    largest = max(FREE, LARGEST_RATIO * file.size)
    number = size = 0
    while line := readline(LONGEST_LINE + 1):
        number, size = number + 1, size + len(line)
        if len(line) > LONGEST_LINE:
            rule = f"is longer than {LONGEST_LINE >> 20} MiB, the limit of a line"
            raise UserError(field, f"{file.path}:{number}", rule, "split this document into several lines")
        if size > largest:
            rule = (
                f"has {file.size} bytes, and unpacks to more than {LARGEST_RATIO} times as much, so it cannot be text"
            )
            raise UserError(field, file.path, rule, "remove it, or unpack it before the training")
        yield line


class _BrokenError(Exception):
    """The data are not complete, valid Zstandard."""


class _Zstandard(io.RawIOBase):
    """Decompresses Zstandard frames, and detects a truncated last frame."""

    def __init__(self, raw: BinaryIO):
        import zstandard  # imported only when such a file is read

        self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._error = zstandard.ZstdError
        self._open: zstandard.ZstdDecompressionObj | None = None
        self._raw, self._input, self._output = raw, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "Buffer", /) -> int:
        view = memoryview(buffer)
        while not self._output:
            self._input = self._input or self._raw.read(ZSTD_INPUT)
            if not self._input:
                if self._open:
                    raise _BrokenError("it is incomplete")
                return 0
            self._open = self._open or self._frame()
            try:
                self._output = self._open.decompress(self._input)
            except self._error as error:
                raise _BrokenError(error) from error
            self._input = self._open.unused_data if self._open.eof else b""
            self._open = None if self._open.eof else self._open
        size = min(len(view), len(self._output))
        view[:size], self._output = self._output[:size], self._output[size:]
        return size


def read_parquet(file: SourceFile, text_key: str, field: str) -> Iterator[tuple[str, str]]:
    """Yields one document per row: the value of the column text_key."""

    def of_text(names: list[str]) -> list[str]:
        if text_key not in names:
            rule = f"has no column {text_key!r}, only: {', '.join(names[:20])}"
            raise UserError(field, file.path, rule, f"set {text_key_of(field)} to the column of the text")
        return [text_key]

    for name, place, record in read_parquet_records(file, field, of_text):
        yield name, check_text(record[text_key], place, text_key, field)


def read_parquet_records(
    file: SourceFile, field: str, columns: Callable[[list[str]], list[str]]
) -> Iterator[tuple[str, str, dict[str, object]]]:
    """Yields (stable id, file and row for error messages, values of the chosen columns) of each row."""
    import pyarrow
    import pyarrow.parquet  # takes half a second, so imported only when such a file is read

    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            wanted = columns(table.schema_arrow.names)
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=wanted):
                for record in batch.to_pylist():
                    yield f"{file.name}:{row}", f"{file.path}, row {row}", record
                    row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            field, file.path, f"is damaged or not Parquet: {error}", "download or write it again"
        ) from error
