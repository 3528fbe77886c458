"""Reads and writes metrics.jsonl, from which every other output of a run can be rebuilt.

The file has one line for each step. A killed process loses no written line. If the disk is full, a partly written line
is removed and held in memory. A resume removes all lines after the resumed step.
"""

import contextlib
import errno
import json
import math
import re
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

from conf.disk import Backlog, explain_disk_error, naming
from conf.files import open_plain, read_tail
from train.metrics.names import LAYERS_MARK, Record, is_layer_metric, order

METRICS_FILE = "metrics.jsonl"
LOADS_PER_STEP = 1024
"""Maximum number of tokens-per-expert values per line, averaged over lines.

A model with more of these values writes them only every n-th step.
"""
TAIL = 1 << 18
"""Bytes at the file's end that `read_last_lines` reads."""
_STEP = re.compile(rb'\{"step":(\d+)[,}]')


def encode_record(record: Record) -> bytes:
    """Encodes a record as a line, with null for non-finite values."""
    plain = {name: _plain(record[name]) for name in sorted(record, key=order)}
    return json.dumps(plain, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _plain(value: Any) -> Any:
    """Converts numpy and torch numbers in a value to Python numbers.

    Floats below 1e8 are rounded to 7 significant digits. Non-finite numbers become None.
    """
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return float(f"{value:.7g}") if abs(value) < 1e8 else value
    return value


class JsonlSink:
    """Appends lines to metrics.jsonl of a run folder.

    - resumed_step: step of the loaded checkpoint, after which lines are removed; 0 for a new run.
    - note: gets a sentence when the disk first refuses a line, and when all lines are written.
    """

    def __init__(self, path: Path, resumed_step: int, note: Callable[[str], None]):
        self._path, self._note, self._refused = path, note, 0
        self._lines = Backlog(self._append)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0, opener=open_plain)  # noqa: SIM115  closed by close()
        self._size = _end_of_step(self._file, resumed_step)
        self._file.truncate(self._size)

    def write(self, record: Record) -> None:
        try:
            self._lines.add(encode_record(_with_loads_now_and_then(record)))
        except OSError as error:
            self._refused += 1
            if self._refused == 1:
                text = f"metrics.jsonl: a line could not be written ({explain_disk_error(error)})"
                self._note(f"{text}; training continues, and the lines stay in memory until there is space")
        else:
            self._tell_of_room()

    def _append(self, line: bytes) -> None:
        """Writes the complete line, or nothing if the disk refuses it."""
        try:
            with naming(self._path, len(line)):
                if (written := self._file.write(line)) != len(line):
                    raise OSError(errno.ENOSPC, f"{written} of {len(line)} bytes written")
        except OSError:
            with contextlib.suppress(
                OSError
            ):  # truncation needs no space; if it fails too, readers skip the partial line
                self._file.truncate(self._size)
            raise
        self._size += len(line)

    def _tell_of_room(self) -> None:
        if self._refused:
            lost = f"; the first {self._lines.dropped} lines are lost" if self._lines.dropped else ""
            self._note(f"metrics.jsonl: there is space again, and the {self._refused} waiting lines are written{lost}")
        self._refused = self._lines.dropped = 0

    def close(self) -> None:
        try:
            self._lines.flush()
            self._tell_of_room()
        except OSError:
            self._note(
                f"metrics.jsonl lacks its last {len(self._lines) + self._lines.dropped} lines, because the disk was full or failed"
            )
        self._file.close()


def _with_loads_now_and_then(record: Record) -> Record:
    loads = sum(len(row) for row in record.get("load", {}).values())
    every = max(1, math.ceil(loads / LOADS_PER_STEP))
    if record["step"] == 1 or record["step"] % every == 0:
        return record
    return {name: value for name, value in record.items() if name != "load"}


def _end_of_step(file: Any, step: int) -> int:
    """Returns the byte offset after the last line up to `step`."""
    end = 0
    file.seek(0)
    for line in file:
        match = _STEP.match(line)
        if not line.endswith(b"\n") or (match and int(match[1]) > step):
            break
        end += len(line)
    return end


def read_heads(path: Path) -> Iterator[Record]:
    """Yields each line's scalars and events, with NaN for null."""
    return (head for head, _ in read_heads_with_loads(path))


def read_heads_with_loads(path: Path) -> Iterator[tuple[Record, bool]]:
    """Yields, for each line: the record without its layer values, and whether the line has tokens per expert."""
    for line in _whole_lines(path):
        head, mark, layers = line.partition(LAYERS_MARK)
        for record in _parse(head + b"}" if mark else line):
            yield record, b'"load":' in layers


def read_last_lines(file: Path) -> list[Record]:
    """Returns the records in the file's last TAIL bytes, oldest first."""
    return [record for line in read_tail(file, TAIL).splitlines() for record in _parse(line)]


def read_last(file: Path) -> Record:
    """Returns the newest record; empty if there is none."""
    return next(reversed(read_last_lines(file)), {})


def read_steps(path: Path, steps: Container[int]) -> Iterator[Record]:
    """Yields the complete records of these steps, including layer values."""
    for line in _whole_lines(path):
        match = _STEP.match(line)
        if match and int(match[1]) in steps:
            yield from _parse(line)


def _whole_lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb", opener=open_plain) as file:
        yield from (line for line in file if line.endswith(b"\n"))


def _parse(line: bytes) -> Iterator[Record]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return
    if isinstance(record, dict) and isinstance(record.get("step"), int):
        yield {
            name: value if value is not None or is_layer_metric(name) else math.nan for name, value in record.items()
        }
