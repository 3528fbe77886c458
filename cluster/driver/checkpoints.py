"""What the driver needs to know of a run's checkpoints: ages and attempt numbers."""

import functools
import json
import re
from pathlib import Path

from cluster.driver.journal import read_events
from cluster.run_files import MANIFEST, NONE, STEP_FOLDERS, Age, hold_lock, read_fence, write_fence


def newest(folder: Path) -> Age:
    """Age of the newest checkpoint that was committed, else NONE; its manifest is there before the folder has its name."""
    return max(_ages(folder), default=NONE)


def claim_attempt(folder: Path, timeout: float) -> int:
    """A number above that of every earlier attempt of this run, 1 or more, which shuts those out from now on: a rank that an
    earlier driver started may only now be about to begin. Raises UserError for a damaged fence, and where a rank
    keeps the folder locked for longer than this, in seconds.
    """
    started = [int(path.stem) for path in (folder / "attempts").glob("*.yaml") if re.fullmatch(r"\d{1,15}", path.stem)]
    told = [event["attempt"] for event in read_events(folder)]  # also one that ended before its ranks were started
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    with hold_lock(checkpoints, timeout):
        number = max([0, read_fence(checkpoints), *started, *told]) + 1
        write_fence(checkpoints, number)
    return number


def written_since(folder: Path, attempt: int) -> bool:
    """Whether this attempt or a later one has committed a checkpoint."""
    return any(age.attempt >= attempt for age in _ages(folder))


def _ages(folder: Path) -> list[Age]:
    """The ages of all checkpoints but those whose manifest is damaged: nobody can tell their age, and no rank resumes
    from them.
    """
    found = []
    for path in (folder / "checkpoints").glob(f"{STEP_FOLDERS}/{MANIFEST}"):
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
