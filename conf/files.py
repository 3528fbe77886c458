"""Small file operations that survive a crash at any instruction.

A reader sees the complete old or the complete new file. A writer fills a temporary file, calls fsync, renames it, and
calls fsync on the folder to make the rename durable.
"""

import errno
import fcntl
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from conf.disk import cure_of_reading, naming
from conf.errors import UserError

NO_PLAIN_FILE = "it is a link, a pipe or a device, not a plain file"
RUN_FILE_BYTES = 256 << 20
"""Maximum bytes of a run folder's file that is read completely."""


def open_plain(path: str | Path, flags: int, mode: int = 0o666) -> int:
    """Open a plain file and return its handle. Raises OSError for a link, a pipe or a device.

    A run folder may belong to another user, who could link to private files or create a pipe that blocks.
    """
    try:
        handle = os.open(path, flags & ~os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # ELOOP: a link; ENXIO: a socket, or a pipe that nobody reads
            raise OSError(errno.ELOOP, NO_PLAIN_FILE, str(path)) from error
        raise
    found = os.fstat(handle).st_mode
    if stat.S_ISREG(found):
        if flags & os.O_TRUNC:
            os.ftruncate(handle, 0)
        return handle
    os.close(handle)
    if stat.S_ISDIR(found):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.ELOOP, NO_PLAIN_FILE, str(path))


def read_plain(path: Path, most: int = RUN_FILE_BYTES) -> bytes:
    """Return the content of a plain file. Raises OSError, and ValueError above `most` bytes."""
    with open(path, "rb", opener=open_plain) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise ValueError(f"{path} has {size} bytes; the limit is {most}")
        return file.read(most)


def read_plain_json(path: Path, most: int = RUN_FILE_BYTES) -> Any:
    """Return the JSON value in a plain file. Raises OSError, and ValueError for other content."""
    try:
        return json.loads(read_plain(path, most))
    except RecursionError:
        raise ValueError(f"{path} has too many nested brackets") from None


def fsync_folder(path: Path) -> None:
    """Call fsync on a folder, so that changed names are durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write_text(path: Path, text: str, durable: bool = True, mode: int = 0o666) -> None:
    """Replace the file's content in one step. After an OSError the old file is unchanged.

    durable: whether the file must survive a crash of the machine. mode: permissions before the umask.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        opener = partial(os.open, mode=mode)
        with naming(path, len(text)):
            with open(temporary, "w", encoding="utf-8", opener=opener) as file:
                file.write(text)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # the temporary file was not created
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_folder(path.parent)


def atomic_write_json(path: Path, value: Any) -> None:
    """Replace the file's content by `value` as JSON in one step."""
    atomic_write_text(path, json.dumps(value))


def read_tail(path: Path, most: int) -> bytes:
    """Return the last `most` bytes of a file; empty if it cannot be read."""
    with suppress(OSError), open(path, "rb", opener=open_plain) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - most))
        return file.read(most)
    return b""


def open_lock(path: Path) -> int:
    """Open a lock file, or create it, and return its handle. Only users with write permission for the folder can open
    the file, so nobody else can block them."""
    handle = open_plain(path, os.O_RDWR | os.O_CREAT, 0o600)
    found = os.fstat(handle)
    if found.st_uid == os.geteuid():  # also for a file that an earlier version created, which all users may open
        writers = os.stat(path.parent).st_mode & 0o022
        mode = 0o600 | writers << 1 | writers
        if stat.S_IMODE(found.st_mode) != mode:
            with suppress(PermissionError):  # the file system has no permissions
                os.fchmod(handle, mode)
    return handle


@contextmanager
def exclusive(path: Path, timeout: float) -> Iterator[None]:
    """Context manager that holds the advisory lock on a file. Raises TimeoutError after `timeout` seconds. The kernel
    releases the lock of a dead process."""
    handle = open_lock(path)
    try:
        deadline = time.monotonic() + timeout
        while not try_lock(handle):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} stayed locked for {timeout:.0f} s")
            time.sleep(0.01)
        yield
    finally:
        os.close(handle)


def try_lock(handle: int) -> bool:
    """Lock an open file; False if another process holds the lock."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def new_folder(given: str | None, field: str) -> Path:
    """Return the path `given` of a folder to create. Raises UserError for a file, or for a folder that is not empty.
    field: setting with the path."""
    assert given is not None, "conf/check.py asks for it"
    target = Path(given).expanduser().absolute()
    if target.is_dir() and any(target.iterdir()):
        raise UserError(field, target, "must be empty or must not exist", "give a new folder, or empty this folder")
    if target.exists() and not target.is_dir():
        raise UserError(field, target, "is a file", "give a folder")
    return target


@contextmanager
def written_whole(target: Path, field: str) -> Iterator[Path]:
    """Context manager that yields a temporary folder, which is renamed to `target` after success. field: setting with
    the path `target`."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        fsync_folder(temporary)
        temporary.rename(target)  # rename also replaces an empty folder
        fsync_folder(target.parent)
    except OSError as error:
        raise UserError(
            field, target, f"cannot be written: {error}", "remove the cause, or give another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# All code reads the user's JSON files with the functions below, so that wrong content never causes a traceback.

LARGEST_FILE = 128 << 20
"""Maximum bytes of a user's JSON file; large tokenizers have 40 MB."""
TYPE_NAMES = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}


def read_json(path: Path, field: str, cure: str, kind: type = dict, value: object = None) -> Any:
    """Return the JSON value in a file. Raises UserError if the file is unreadable, or the value's type is not `kind`.

    field, value, cure: key, value and fix that the error shows. If `value` is None, the error shows the path as value.
    For an OSError, it shows the fix from `cure_of_reading` instead of `cure`.
    """
    try:
        return parse_json(read_plain_text(path), kind)
    except ValueError as error:
        if isinstance(error.__cause__, OSError):
            cure = cure_of_reading(error.__cause__)
        raise UserError(field, value or path, f"{path.name} cannot be read: {error}", cure) from error


def read_plain_text(path: Path) -> str:
    """Return the text of a plain file. Raises ValueError with a message for the user."""
    try:
        if not path.is_file():
            raise ValueError("it is not a plain file" if path.exists() else "no such file")
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise ValueError(f"it has {size} bytes; the limit is {LARGEST_FILE}")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text: {error.reason} at byte {error.start}") from error


def parse_json(text: str, kind: type = dict) -> Any:
    """Return the JSON value in a text. Raises ValueError, with a message for the user, unless its type is `kind`."""
    try:
        body = json.loads(text)
    except RecursionError:
        raise ValueError("it has too many nested brackets") from None
    except ValueError as error:  # invalid JSON, or a number with thousands of digits
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(body, kind):
        raise ValueError(f"it must contain {TYPE_NAMES[kind]}, and contains {TYPE_NAMES.get(type(body), 'a number')}")
    return body
