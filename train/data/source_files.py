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

from conf.disk import cure_of_reading
from conf.errors import UserError
from train.data.prepare_progress import ReportProgress
from train.data.token_store import keep_text

HASHED_BYTES = 8 << 20
RACE = 10**9 * 2
"""ns: a file changed so shortly before it was hashed may change again within the resolution of its timestamp."""


@dataclass(frozen=True)
class SourceFile:
    path: Path
    name: str
    """Path relative to the source's root, with slashes: the same on every machine."""
    size: int
    modified: int
    """mtime in ns."""


def find_files(root: Path, field: str, skip_folders: frozenset[str] = frozenset()) -> list[SourceFile]:
    """The file `root`, or the files under it. Raises UserError when there is nothing to read."""
    try:
        if root.is_file():
            return [_file(root, root.name)]
        if not root.is_dir():
            raise UserError(
                field,
                root,
                "no such file or folder",
                f"check the path; where the text lies elsewhere, give {field}=PATH",
            )
        found = []
        for folder, folders, names in os.walk(root, onerror=_raise):
            folders[:] = [name for name in folders if name[0] != "." and name not in skip_folders]
            paths = [Path(folder, name) for name in names if name[0] != "."]
            found += [_file(path, path.relative_to(root).as_posix()) for path in paths if path.is_file()]
    except OSError as error:
        raise unreadable(error, field, error.filename or root) from error
    return sorted(found, key=lambda file: file.name)


def unreadable(error: OSError, field: str, path: Path | str) -> UserError:
    """The error of a file of the data that a disk does not give. Other libraries' errors have a text and no number."""
    return UserError(field, path, f"cannot be read: {error.strerror or error}", cure_of_reading(error))


def _file(path: Path, name: str) -> SourceFile:
    status = path.stat()
    return SourceFile(path, name, status.st_size, status.st_mtime_ns)


def _raise(error: OSError) -> None:
    raise error


def content_id(place: str, content: str) -> str:
    """The stable id of a document that its content decides on; the place in front of it is for a person."""
    return f"{place}\0{hashlib.blake2b(content.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}"


def place_of(name: str) -> str:
    """Where a document with this stable id is: its file's path in the source, with the line or row."""
    return name.partition("\0")[0]


def hash_id(name: str) -> int:
    """64 bits for the stable id of a document, which decide on which side it falls."""
    name = name.rpartition("\0")[2]
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def digest_files(files: list[SourceFile], manifest: Path, field: str, progress: ReportProgress) -> str:
    """Hash of the names and contents of the files.

    The hash of each file is remembered in the manifest with its size and mtime, so that only changed files are read.
    """
    known = _read_manifest(manifest)
    changed = [file for file in files if known.get(file.name, [])[:2] != [file.size, file.modified]]
    total, done = sum(file.size for file in changed), 0
    fresh: dict[str, list] = {}
    for file in changed:
        fresh[file.name] = [
            file.size,
            file.modified,
            _digest(file, field, lambda more: progress("reading", more, total), done),
        ]
        done += file.size
    entries = {file.name: fresh.get(file.name) or known[file.name] for file in files}
    if changed:
        settled = time.time_ns() - RACE
        kept = {name: entry for name, entry in entries.items() if entry[1] < settled}
        keep_text(manifest, json.dumps(kept))
    return hashlib.blake2b(
        json.dumps([[name, entry[2]] for name, entry in entries.items()]).encode(), digest_size=16
    ).hexdigest()


def _read_manifest(path: Path) -> dict[str, list]:
    """What was remembered; a manifest that is missing or damaged remembers nothing, and is written again."""
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _digest(file: SourceFile, field: str, progress: Callable[[int], None], done: int) -> str:
    """Hash of the content; progress is told the bytes read, counted from done."""
    whole = hashlib.blake2b(digest_size=16)
    try:
        with file.path.open("rb") as stream:
            while chunk := stream.read(HASHED_BYTES):
                whole.update(chunk)
                done += len(chunk)
                progress(done)
    except OSError as error:
        raise unreadable(error, field, file.path) from error
    return whole.hexdigest()
