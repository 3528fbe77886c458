"""Disks that are full or refuse to be written: how much room they have, and their errors as a user reads them.

Three rules hold for every file that the program writes. Errors name the file (`naming`). What a run can do without, such
as progress or the report, is given up with a note, and the run goes on; lines of metrics and events wait for room (`Backlog`). The
rest becomes one screen (`disk_errors`) that names the setting, the disk, the bytes that are needed and the cure.
"""

import errno
import io
import os
import shutil
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from conf.errors import UserError
from conf.schema import Config

BACKLOG = 64 << 20
"""Bytes that may wait in memory for room on a disk."""
FULL = {errno.ENOSPC, errno.EDQUOT}
REFUSED = FULL | {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EFBIG, errno.EIO}


@contextmanager
def naming(path: Path, needed: int | None = None) -> Iterator[None]:
    """Let an OSError of this block, such as that of a write, name the file. needed: bytes that the file takes."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename, error.needed = str(path), needed
        raise


def room(path: Path | str) -> str:
    """The disk that holds, or would hold, this path, and how much of it is free."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    while not os.path.ismount(place):
        place = place.parent
    return f"the disk at {place} has {size(usage.free)} of {size(usage.total)} free"


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def explain(error: OSError) -> str:
    """What the system says, and, of a full disk, which one it is and how much is missing."""
    if error.errno not in FULL or not isinstance(error.filename, str):
        return str(error)
    needed = getattr(error, "needed", None)
    return f"{error}; {room(error.filename)}" + (f", {size(needed)} are needed" if needed else "")


class Backlog:
    """Pieces for the end of a file, in order. Those that its disk refuses wait in memory, and are written once there is room."""

    def __init__(self, write: Callable[[bytes], None]):
        """write: appends all of a piece, or raises OSError and leaves the file as it was."""
        self._write = write
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self.dropped = 0
        """Pieces that are lost, the oldest, as more than BACKLOG bytes waited."""

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, piece: bytes) -> None:
        """Write it behind what waits; OSError if it waits now too."""
        self._waiting.append(piece)
        self._bytes += len(piece)
        while self._bytes > BACKLOG and len(self._waiting) > 1:
            self._bytes -= len(self._waiting.popleft())
            self.dropped += 1
        self.flush()

    def flush(self) -> None:
        """Write what waits; OSError if the disk refuses it still."""
        while self._waiting:
            self._write(self._waiting[0])
            self._bytes -= len(self._waiting.popleft())


@contextmanager
def disk_errors(*configs: Config, kind: type[UserError] = UserError) -> Iterator[None]:
    """Turn the refusal of a disk into an error of this kind, which names the setting that leads there."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSED or not isinstance(error.filename, str):
            raise
        field, value = _setting(Path(error.filename), configs)
        rule = f"{error.filename} cannot be written or read: {error.strerror}"
        if error.errno in FULL:
            cure = f"free space there, or set {field} to a folder on a larger disk"
            needed = getattr(error, "needed", None)
            rule += f"; {room(error.filename)}" + (f", {size(needed)} are needed" if needed else "")
        else:
            cure = f"make it writable for user {os.geteuid()} (is the disk mounted read-only?), or set {field} to another folder"
        raise kind(field, value, rule, cure) from error


def _setting(path: Path, configs: tuple[Config, ...]) -> tuple[str, str]:
    """The key whose folder holds the path, and its value."""
    for config in configs:
        for key, value in (
            ("export.to", config.export.to),
            ("data.cache (or SLUICE_CACHE)", config.data.cache),
            ("runs", config.runs),
        ):
            if value is not None and path.absolute().is_relative_to(Path(value).expanduser().absolute()):
                return key, value
    return "file", str(path)


def let_output_be_lost() -> None:
    """From now on, output that goes to a file is dropped while that file's disk is full, instead of ending this process."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            in_file = stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
        except (OSError, ValueError, AttributeError):  # closed, or no file at all: tests capture it
            continue
        if in_file:
            stream.flush()
            raw = _Lossy(stream.fileno(), "wb", closefd=False)
            lossy = io.TextIOWrapper(
                raw if stream.write_through else io.BufferedWriter(raw),
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, lossy)


class _Lossy(io.FileIO):
    """A file whose disk may be full."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            return len(data)
