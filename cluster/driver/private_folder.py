"""A folder of one process that no other user can reach, and that does not stay behind where the process is killed.

The process holds a lock on it, which the system lets go of however the process ends. Whoever makes the next folder removes
those without one.
"""

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from conf.files import try_lock

PREFIX = "sluice-ray-"
FRESH = 60.0
"""Seconds after its making in which a folder without a lock may be about to get one."""


class PrivateFolder:
    """Made at once, of mode 0700. Not in TMPDIR, which may be too long for a socket."""

    def __init__(self, parent: Path = Path("/tmp")):
        _sweep(parent)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = os.open(self.path, os.O_RDONLY)
        try_lock(self._lock)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _sweep(parent: Path) -> None:
    """Remove this user's folders whose process has ended."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another process removes it
            state = folder.lstat()
            if state.st_uid != os.getuid() or time.time() - state.st_mtime < FRESH:
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if try_lock(lock):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
