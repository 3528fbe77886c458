"""A small file per rank that says what it is doing, for whoever watches over the ranks."""

import json
import os
import time
from pathlib import Path


class RankProgress:
    """Writes logs/rank_N.progress.json: step, phase (step, validation, checkpoint), Unix time, and busy.

    busy: seconds of the step before that the rank worked, without its waits for other ranks; null at the start.
    """

    def __init__(self, logs: Path, rank: int):
        self._path = logs / f"rank_{rank}.progress.json"
        self._temporary = self._path.with_name(f".{self._path.name}")

    def write(self, step: int, phase: str, busy: float | None = None) -> None:
        """Replace the file in one move, so that a reader never sees a part."""
        self._temporary.write_text(json.dumps({"step": step, "phase": phase, "time": time.time(), "busy": busy}))
        os.replace(self._temporary, self._path)
