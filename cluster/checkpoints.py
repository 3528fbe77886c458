"""What the driver needs to know of a run's checkpoints: names and attempt numbers (see train/checkpoint/manifest.py)."""

import json
from pathlib import Path


def newest(folder: Path) -> int | None:
    """Step of the newest checkpoint that was committed; its manifest is written before the folder gets its name."""
    steps = [int(path.parent.name.removeprefix("step_")) for path in _manifests(folder)]
    return max(steps, default=None)


def first_attempt(folder: Path) -> int:
    """A number above that of every earlier attempt of this run, 1 or more."""
    fence = folder / "checkpoints" / ".fence"
    fenced = int(fence.read_text()) if fence.exists() else 0
    started = [int(path.stem) for path in (folder / "attempts").glob("*.yaml")]
    return max([fenced, *started], default=0) + 1


def written_since(folder: Path, attempt: int) -> bool:
    """Whether this attempt or a later one has committed a checkpoint."""
    return any(json.loads(path.read_text())["attempt"] >= attempt for path in _manifests(folder))


def _manifests(folder: Path) -> list[Path]:
    return list((folder / "checkpoints").glob("step_*/manifest.json"))
