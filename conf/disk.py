"""Handles disk errors: free space, and error messages for disks that are full, broken, or deny access.

Rules for every file that the program writes:
- An error contains the name of the file (`naming`).
- A file that the run does not need causes only a note. Metrics and events wait in memory for disk space (`Backlog`).
- Any other error ends the command with one screen (`disk_errors`): the setting, the disk, the needed bytes, the fix.

Only `cure_of_reading` and `cure_of_writing` choose the fix.
"""

import errno
import io
import os
import re
import shutil
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from conf.errors import UserError
from conf.schema import Config

if TYPE_CHECKING:
    from typing_extensions import Buffer

BACKLOG = 64 << 20
"""Maximum bytes in memory that wait for disk space."""
FULL = {errno.ENOSPC, errno.EDQUOT}
RIGHTS = {errno.EACCES, errno.EPERM}
DISK_FAILED = {
    errno.EIO,
    errno.ENXIO,
    errno.ENODEV,
    errno.EREMOTEIO,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EUCLEAN,
    errno.EBADMSG,
}
"""Error numbers of a broken disk, file system or network."""
HANDLES = {errno.EMFILE, errno.ENFILE}
REFUSED = FULL | RIGHTS | DISK_FAILED | {errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EFBIG, errno.ELOOP}


@contextmanager
def naming(path: Path, needed: int | None = None, way: str = "written") -> Iterator[None]:
    """Context manager that adds the file's name to an OSError.

    needed: bytes of the file. way: the failed operation, `written` or `read`.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
            vars(error).update(needed=needed, way=way)
        raise


def reading(path: Path) -> AbstractContextManager[None]:
    """Context manager that adds the file's name to an OSError while reading."""
    return naming(path, way="read")


def is_refusal(error: Exception) -> TypeGuard[OSError]:
    """Whether the error leaves the file's content unknown: missing rights, a broken disk, or too many open files."""
    return isinstance(error, OSError) and _number(error) in RIGHTS | DISK_FAILED | HANDLES


def _number(error: OSError) -> int | None:
    """Return the errno, which Rust and C++ libraries have only in the text."""
    found = re.search(r"\b(?:os error|errno) (\d+)", str(error)) if error.errno is None else None
    return int(found[1]) if found else error.errno


def cure_of_reading(error: OSError) -> str:
    """Return the fix for a file that cannot be read."""
    if _number(error) in RIGHTS:
        return f"let user {os.geteuid()} read it (`ls -l`, and `ls -ld` of the folders above it)"
    if _number(error) in {errno.ENOENT, errno.ENOTDIR}:
        return "check the path: the file does not exist, or was removed meanwhile"
    return _cure(error) or "check that it is a readable plain file"


def cure_of_writing(error: OSError) -> str:
    """Return the fix for a file or folder that cannot be written."""
    if error.errno in FULL:
        return "free space on this disk"
    if error.errno == errno.EISDIR:
        return "remove or rename this folder: its name is needed for a file"
    if error.errno == errno.EFBIG:
        return "raise the limit of file sizes (`ulimit -f`), or use a file system for larger files"
    if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.EEXIST}:
        return "check the path: a part of it is a file, or was removed"
    return _cure(error) or f"make it writable for user {os.geteuid()} (is the disk mounted read-only?)"


def _cure(error: OSError) -> str | None:
    """Return the fix for a disk error if reading and writing have the same fix; None for other errors."""
    if _number(error) in DISK_FAILED:
        return "the disk, or the network to it, has failed: see `dmesg` on this machine, repair it, and start again"
    if error.errno == errno.ELOOP:
        return "remove it: files of a run and of the cache are plain files, never links (a folder may be a link)"
    if _number(error) in HANDLES:
        return "raise the limit of open files (`ulimit -n`)"
    return None


def describe_room(path: Path | str) -> str:
    """Return a sentence about the free space of a path's disk."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    while not os.path.ismount(place):
        place = place.parent
    return f"the disk at {place} has {size_in_words(usage.free)} of {size_in_words(usage.total)} free"


def size_in_words(count: float) -> str:
    """Return a number of bytes as text with a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def explain_disk_error(error: OSError) -> str:
    """Return the system's message and, for a full disk, its name, free space and the needed bytes."""
    if error.errno not in FULL or not isinstance(error.filename, str):
        return str(error)
    needed = getattr(error, "needed", None)
    return f"{error}; {describe_room(error.filename)}" + (f"; {size_in_words(needed)} are needed" if needed else "")


class Backlog:
    """Appends data to a file in order, and holds data while the disk refuses them."""

    def __init__(self, write: Callable[[bytes], None]):
        """write: appends all bytes, or raises OSError and appends nothing."""
        self._write = write
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self.dropped = 0
        """Number of dropped items. While more than BACKLOG bytes are held, the oldest item is dropped."""

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, piece: bytes) -> None:
        """Append the held data, then `piece`. If the disk refuses data, hold the rest and raise OSError."""
        self._waiting.append(piece)
        self._bytes += len(piece)
        while self._bytes > BACKLOG and len(self._waiting) > 1:
            self._bytes -= len(self._waiting.popleft())
            self.dropped += 1
        self.flush()

    def flush(self) -> None:
        """Append the held data. Raises OSError if the disk refuses again."""
        while self._waiting:
            self._write(self._waiting[0])
            self._bytes -= len(self._waiting.popleft())


@contextmanager
def disk_errors(*configs: Config, kind: type[UserError] = UserError) -> Iterator[None]:
    """Context manager that converts an OSError of a disk to an error of class `kind`. The error names the setting whose
    folder contains the file (`_setting`)."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSED | HANDLES or not isinstance(error.filename, str):
            raise
        path, way = Path(error.filename), _way(error)
        field, value = _setting(path, configs)
        rule = f"{path} cannot be {way}: {error.strerror}"
        if way == "read":
            raise kind(field, value, rule, cure_of_reading(error)) from error
        cure = cure_of_writing(error)
        if error.errno in FULL:
            needed = getattr(error, "needed", None)
            rule += f"; {describe_room(path)}" + (f"; {size_in_words(needed)} are needed" if needed else "")
            cure += f", or set {field} to a folder on a larger disk"
        elif field != "file" and error.errno not in HANDLES:
            cure += f", or set {field} to another folder"
        raise kind(field, value, rule, cure) from error


def _way(error: OSError) -> str:
    """Return the failed operation: `written`, `read`, or `written or read` if unknown."""
    if way := getattr(error, "way", None):
        return way
    if error.errno in FULL | {errno.EROFS, errno.EFBIG}:
        return "written"
    if error.errno in RIGHTS and os.path.isfile(error.filename):
        return "written" if os.access(error.filename, os.R_OK) else "read"
    return "written or read"


def _setting(path: Path, configs: tuple[Config, ...]) -> tuple[str, str]:
    """Return key and value of the setting whose folder contains the path, else `file` and the path."""
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
    """Make this process drop output that a full disk refuses."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            in_file = stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
        # The stream is closed, or it is not a file because tests capture it.
        except (OSError, ValueError, AttributeError):
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
    """A file that drops the data that its disk refuses."""

    def write(self, data: "Buffer", /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            return memoryview(data).nbytes
