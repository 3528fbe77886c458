"""Reads the ages of a run's checkpoints, and chooses the next attempt number."""

import functools
import json
import re
from pathlib import Path

from cluster.driver.journal import read_events
from cluster.run_files import MANIFEST, NONE, STEP_FOLDERS, Age, hold_lock, read_fence, write_fence


def newest(folder: Path) -> Age:
    """Return the age of the newest committed checkpoint, or NONE."""
    return max(_ages(folder), default=NONE)


def claim_attempt(folder: Path, timeout: float) -> int:
    """Return a new attempt number. Earlier attempts can no longer write checkpoints.

    Raises UserError if the fence is damaged, or if a rank locks the folder for longer than `timeout` seconds.
    """
    started = [int(path.stem) for path in (folder / "attempts").glob("*.yaml") if re.fullmatch(r"\d{1,15}", path.stem)]
    # attempts that ended before their ranks started are named only by the events
    recorded = [event["attempt"] for event in read_events(folder)]
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    with hold_lock(checkpoints, timeout):
        # a copy of the run folder may lack the hidden fence: its checkpoints name their attempts, too
        number = max([0, read_fence(checkpoints), newest(folder).attempt, *started, *recorded]) + 1
        write_fence(checkpoints, number)
    return number


def written_since(folder: Path, attempt: int) -> bool:
    """Whether this attempt or a later one has committed a checkpoint."""
    return any(age.attempt >= attempt for age in _ages(folder))


def _ages(folder: Path) -> list[Age]:
    """Return the ages of all checkpoints with a readable manifest."""
    found = []
    for path in (folder / "checkpoints").glob(f"{STEP_FOLDERS}/{MANIFEST}"):
        try:
            status = path.stat()
            attempt = _attempt_of(path, status.st_ino, status.st_mtime_ns)
        except FileNotFoundError:  # another process is replacing or deleting this checkpoint
            continue
        if attempt is not None:
            found.append(Age(attempt, int(path.parent.name.removeprefix("step_"))))
    return found


@functools.lru_cache(maxsize=1024)
def _attempt_of(path: Path, inode: int, written: int) -> int | None:
    """Return the attempt that wrote a manifest, or None for another file."""
    try:
        return int(json.loads(path.read_bytes())["attempt"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
