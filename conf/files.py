"""Small file operations that survive a crash at any instruction.

A reader sees the old file or the new one, never a part: write under another name, fsync, rename, and fsync the
folder, as a rename is durable only once its folder is.
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

NO_PLAIN_FILE = "it is no plain file, but a link, a pipe or a device"
RUN_FILE_BYTES = 256 << 20
"""Most bytes of a file of a run folder that is read whole into memory."""


def open_plain(path: str | Path, flags: int, mode: int = 0o666) -> int:
    """A handle of a plain file, as `open` takes it for its `opener`. Raises OSError for a link, a pipe, a device and all else that is none.

    Whatever is opened under a run folder is opened by this: the folder may be somebody else's, who put a link to a file of this user there.
    A pipe would let this process wait for ever.
    """
    try:
        handle = os.open(path, flags & ~os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a pipe that nobody reads, or a socket
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
    """The content of a file of a run folder. Raises OSError; ValueError where it has more than so many bytes."""
    with open(path, "rb", opener=open_plain) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise ValueError(f"{path} has {size} bytes, and {most} are the most that it may have")
        return file.read(most)


def read_plain_json(path: Path, most: int = RUN_FILE_BYTES) -> Any:
    """The JSON value in a file of a run folder. Raises OSError; ValueError for all that is none."""
    try:
        return json.loads(read_plain(path, most))
    except RecursionError:
        raise ValueError(f"{path} has brackets that are nested too deep") from None


def fsync_folder(path: Path) -> None:
    """Make names created, renamed or removed in this folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write_text(path: Path, text: str, durable: bool = True, mode: int = 0o666) -> None:
    """Replace the file by `text` (UTF-8) in one step. OSError leaves the old file as it was.

    durable: survive a crash of the machine as well as one of this process. mode: of the file, less the umask.
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
        with suppress(OSError):  # it was not even made
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_folder(path.parent)


def atomic_write_json(path: Path, value: Any) -> None:
    """Replace the file by `value` as JSON in one step."""
    atomic_write_text(path, json.dumps(value))


def read_tail(path: Path, most: int) -> bytes:
    """The last bytes of a file, so many at most; none of one that cannot be read."""
    with suppress(OSError), open(path, "rb", opener=open_plain) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - most))
        return file.read(most)
    return b""


def open_lock(path: Path) -> int:
    """A handle of a lock file, created if missing. Who may open a file can lock it, if only to keep others out, so nobody may but
    those who can write the folder: they could put another file in its place.
    """
    handle = open_plain(path, os.O_RDWR | os.O_CREAT, 0o600)
    found = os.fstat(handle)
    if found.st_uid == os.geteuid():  # also one that an earlier version made, open to everybody
        writers = os.stat(path.parent).st_mode & 0o022
        mode = 0o600 | writers << 1 | writers
        if stat.S_IMODE(found.st_mode) != mode:
            with suppress(PermissionError):  # a file system that keeps no modes
                os.fchmod(handle, mode)
    return handle


@contextmanager
def exclusive(path: Path, timeout: float) -> Iterator[None]:
    """Hold the advisory lock on this file, created if missing; TimeoutError after `timeout` seconds.

    The kernel frees the lock when its holder dies.
    """
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
    """Take the advisory lock of an open file; False where another holds it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def new_folder(given: str | None, field: str) -> Path:
    """The folder that a mode is to make. given: the value of field. Raises UserError where something is in its way."""
    assert given is not None, "conf/check.py asks for it"
    target = Path(given).expanduser().absolute()
    if target.is_dir() and any(target.iterdir()):
        raise UserError(field, target, "must be empty or not exist yet", "give a new folder, or empty this one")
    if target.exists() and not target.is_dir():
        raise UserError(field, target, "is a file", "give a folder")
    return target


@contextmanager
def written_whole(target: Path, field: str) -> Iterator[Path]:
    """A hidden folder that becomes the target when all went well, and is removed when not. field: the key that names the target."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        fsync_folder(temporary)
        temporary.rename(target)  # over an empty folder too
        fsync_folder(target.parent)
    except OSError as error:
        raise UserError(field, target, f"cannot be written: {error}", "correct that, or give another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# JSON of a file that a user gives, read in one place: whatever is in it, the user gets a rule and no traceback.

LARGEST_FILE = 128 << 20
"""Bytes of a file, at most. The index of DeepSeek-V3's 91,991 tensors has 9 MB, tokenizers of large vocabularies 10 to 40."""
TYPE_NAMES = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}


def read_json(path: Path, field: str, cure: str, kind: type = dict, value: object = None) -> Any:
    """The content of a file, of that kind. Raises UserError(field, value or else the path, what is wrong, cure).

    cure: of wrong content; a disk that refuses has its own.
    """
    try:
        return parse_json(read_plain_text(path), kind)
    except ValueError as error:
        if isinstance(error.__cause__, OSError):
            cure = cure_of_reading(error.__cause__)
        raise UserError(field, value or path, f"{path.name} cannot be read: {error}", cure) from error


def read_plain_text(path: Path) -> str:
    """The text of a plain file. Raises ValueError, in words for a user."""
    try:
        if not path.is_file():
            raise ValueError("it is no plain file" if path.exists() else "no such file")
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise ValueError(f"it has {size} bytes, and {LARGEST_FILE} are the most that such a file needs")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 text: {error.reason} at byte {error.start}") from error


def parse_json(text: str, kind: type = dict) -> Any:
    """The value of that kind that a text holds. Raises ValueError, in words for a user."""
    try:
        body = json.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deep") from None
    except ValueError as error:  # broken JSON, or a number of thousands of digits
        raise ValueError(f"it is no JSON: {error}") from error
    if not isinstance(body, kind):
        raise ValueError(f"it must hold {TYPE_NAMES[kind]}, and holds {TYPE_NAMES.get(type(body), 'a number')}")
    return body
