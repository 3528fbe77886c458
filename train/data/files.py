"""Finding the files of a source, and naming their content without reading them each time.

Which files: every file under the folder in the order of its path, except hidden ones (a name that begins with a dot, or
inside such a folder). Links to folders are not followed.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conf.errors import UserError
from train.data.store import write_atomically

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done and how much there is (in bytes)."""

RACE = 2.0
"""Seconds: a file changed so shortly before it was hashed may change again within its timestamp's resolution."""


@dataclass(frozen=True)
class File:
    path: Path
    name: str
    """Path relative to the source's root, with slashes: the same on every machine."""
    size: int
    modified: int
    """mtime in ns."""


def find_files(root: Path, field: str, skip_folders: frozenset[str] = frozenset()) -> list[File]:
    """The file `root`, or the files under it. Raises UserError when there is nothing to read."""
    try:
        if root.is_file():
            return [_file(root, root.name)]
        if not root.is_dir():
            raise UserError(field, root, "no such file or folder", "check the path")
        found = []
        for folder, folders, names in os.walk(root, onerror=_raise):
            folders[:] = [name for name in folders if name[0] != "." and name not in skip_folders]
            paths = [Path(folder, name) for name in names if name[0] != "."]
            found += [_file(path, path.relative_to(root).as_posix()) for path in paths if path.is_file()]
    except OSError as error:
        raise UserError(
            field, error.filename or root, f"cannot be read: {error.strerror}", "check its rights"
        ) from error
    return sorted(found, key=lambda file: file.name)


def _file(path: Path, name: str) -> File:
    status = path.stat()
    return File(path, name, status.st_size, status.st_mtime_ns)


def _raise(error: OSError) -> None:
    raise error


def digest_files(files: list[File], manifests: Path, root: Path, field: str, progress: Progress) -> str:
    """Hash of the names and contents of the files.

    The hash of each file is remembered in a manifest with its size and mtime, so that only changed files are read.
    """
    manifest = manifests / f"{hashlib.blake2b(os.fsencode(root.absolute()), digest_size=16).hexdigest()}.json"
    known = _read_manifest(manifest)
    total, done = sum(file.size for file in files), 0
    entries, changed = {}, False
    whole = hashlib.blake2b(digest_size=16)
    for file in files:
        entry = known.get(file.name)
        if entry is None or entry[:2] != [file.size, file.modified]:
            started = time.time()
            entry = [file.size, file.modified, _digest(file, field)]
            progress("reading", done, total)
            settled = file.modified / 1e9 < started - RACE
        else:
            settled = True
        if settled:
            entries[file.name] = entry
            changed |= file.name not in known or known[file.name] != entry
        whole.update(json.dumps([file.name, entry[2]]).encode())
        done += file.size
    if changed:
        write_atomically(manifest, json.dumps(entries).encode())
    return whole.hexdigest()


def _read_manifest(path: Path) -> dict[str, list]:
    """What was remembered; a manifest that is missing or damaged remembers nothing, and is written anew."""
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _digest(file: File, field: str) -> str:
    try:
        with file.path.open("rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise UserError(field, file.path, f"cannot be read: {error.strerror}", "check its rights") from error
