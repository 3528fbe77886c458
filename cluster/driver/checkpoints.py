"""What the driver needs to know of a run's checkpoints: names and attempt numbers (see train/checkpoint/manifest.py)."""

import functools
import json
from pathlib import Path
from typing import NamedTuple

from conf.errors import UserError


class Age(NamedTuple):
    """Order of writing: a later attempt is newer even where it resumed from an earlier step."""

    attempt: int
    step: int


NONE = Age(0, -1)
"""Before every state of a run."""


def newest(folder: Path) -> Age:
    """Age of the newest checkpoint that was committed, else NONE; its manifest is there before the folder has its name."""
    return max(_ages(folder), default=NONE)


def first_attempt(folder: Path) -> int:
    """A number above that of every earlier attempt of this run, 1 or more."""
    fence = folder / "checkpoints" / ".fence"
    try:
        fenced = int(fence.read_text()) if fence.exists() else 0
    except ValueError as error:
        cure = "write the highest number of the files in attempts/ into it, or remove it if no attempt of this run is alive"
        raise UserError("checkpoint", fence, f"is damaged: {error}", cure) from error
    started = [int(path.stem) for path in (folder / "attempts").glob("*.yaml")]
    return max([fenced, *started], default=0) + 1


def written_since(folder: Path, attempt: int) -> bool:
    """Whether this attempt or a later one has committed a checkpoint."""
    return any(age.attempt >= attempt for age in _ages(folder))


def _ages(folder: Path) -> list[Age]:
    """Of all checkpoints but those whose manifest is damaged: nobody can tell their age, and no rank resumes from them."""
    found = []
    for path in (folder / "checkpoints").glob("step_*/manifest.json"):
        try:
            status = path.stat()
            attempt = _attempt_of(path, status.st_ino, status.st_mtime_ns)
        except FileNotFoundError:  # a rank puts a newer one in its place, or prunes it
            continue
        if attempt is not None:
            found.append(Age(attempt, int(path.parent.name.removeprefix("step_"))))
    return found


@functools.lru_cache(maxsize=1024)
def _attempt_of(path: Path, inode: int, written: int) -> int | None:
    """Attempt that wrote a manifest, None if it is no manifest. Kept per file: a large run's are megabytes, and the
    driver looks every second.
    """
    try:
        return int(json.loads(path.read_bytes())["attempt"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
