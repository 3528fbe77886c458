"""Disks that are full, fail, or refuse to be read or written: how much room they have, and their errors as a user reads them.

Three rules hold for every file that the program writes. Errors name the file (`naming`). What a run can do without, such
as progress or the report, is given up with a note, and the run goes on; lines of metrics and events wait for room (`Backlog`). The
rest becomes one screen (`disk_errors`) that names the setting, the disk, the bytes that are needed and the cure. What a user can do
about an error depends on what the system says, and stands here alone: `cure_of_reading` and `cure_of_writing`.
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
"""Bytes that may wait in memory for room on a disk."""
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
"""A disk, its file system, or the network to it does not work: nothing that the user of a file has set or can set."""
HANDLES = {errno.EMFILE, errno.ENFILE}
REFUSED = FULL | RIGHTS | DISK_FAILED | {errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EFBIG, errno.ELOOP}


@contextmanager
def naming(path: Path, needed: int | None = None, way: str = "written") -> Iterator[None]:
    """Let an OSError of this block, which writes the file, name it. needed: bytes that the file takes. way: what cannot be done with it."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
            vars(error).update(needed=needed, way=way)
        raise


def reading(path: Path) -> AbstractContextManager[None]:
    """Let an OSError of this block, which reads the file, name it: that of `read` does not say of which file it is."""
    return naming(path, way="read")


def is_refusal(error: Exception) -> TypeGuard[OSError]:
    """Whether a disk does not give what it holds, so that nothing is known of what is in the file."""
    return isinstance(error, OSError) and _number(error) in RIGHTS | DISK_FAILED | HANDLES


def _number(error: OSError) -> int | None:
    """The errno; libraries in Rust and C++ have it in their text alone."""
    found = re.search(r"\b(?:os error|errno) (\d+)", str(error)) if error.errno is None else None
    return int(found[1]) if found else error.errno


def cure_of_reading(error: OSError) -> str:
    """What a user can do about a file that cannot be read."""
    if _number(error) in RIGHTS:
        return f"let user {os.geteuid()} read it (`ls -l`, and `ls -ld` of the folders above it)"
    if _number(error) in {errno.ENOENT, errno.ENOTDIR}:
        return "check the path: nothing is there, or something has removed it meanwhile"
    return _cure(error) or "check that it is a plain file that can be read"


def cure_of_writing(error: OSError) -> str:
    """What a user can do about a file or a folder that cannot be written."""
    if error.errno in FULL:
        return "free space there"
    if error.errno == errno.EISDIR:
        return "remove or rename this folder: it stands where a file belongs"
    if error.errno == errno.EFBIG:
        return "raise the limit on the size of a file (`ulimit -f`), or take a file system that holds larger ones"
    if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.EEXIST}:
        return "check the path: a part of it is a file, or was removed"
    return _cure(error) or f"make it writable for user {os.geteuid()} (is the disk mounted read-only?)"


def _cure(error: OSError) -> str | None:
    """What can be done whether a file is read or written; None where that makes a difference."""
    if _number(error) in DISK_FAILED:
        return "the disk, or the network to it, has failed: see `dmesg` on this machine, and start again once it works"
    if error.errno == errno.ELOOP:
        return "remove it: files of a run and of the cache are plain files, never links (a folder may be a link)"
    if _number(error) in HANDLES:
        return "raise the limit on open files (`ulimit -n`)"
    return None


def describe_room(path: Path | str) -> str:
    """The disk that holds, or would hold, this path, and how much of it is free."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    while not os.path.ismount(place):
        place = place.parent
    return f"the disk at {place} has {size_in_words(usage.free)} of {size_in_words(usage.total)} free"


def size_in_words(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def explain_disk_error(error: OSError) -> str:
    """What the system says, and, of a full disk, which one it is and how much is missing."""
    if error.errno not in FULL or not isinstance(error.filename, str):
        return str(error)
    needed = getattr(error, "needed", None)
    return f"{error}; {describe_room(error.filename)}" + (f", {size_in_words(needed)} are needed" if needed else "")


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
            rule += f"; {describe_room(path)}" + (f", {size_in_words(needed)} are needed" if needed else "")
            cure += f", or set {field} to a folder on a larger disk"
        elif field != "file" and error.errno not in HANDLES:
            cure += f", or set {field} to another folder"
        raise kind(field, value, rule, cure) from error


def _way(error: OSError) -> str:
    """Whether the file was read or written, as far as that is known: only some errors tell."""
    if way := getattr(error, "way", None):
        return way
    if error.errno in FULL | {errno.EROFS, errno.EFBIG}:
        return "written"
    if error.errno in RIGHTS and os.path.isfile(error.filename):
        return "written" if os.access(error.filename, os.R_OK) else "read"
    return "written or read"


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

    def write(self, data: "Buffer", /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            return memoryview(data).nbytes
