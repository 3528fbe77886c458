"""A folder of one process that no other user can read. It is removed even if the process is killed.

The process holds a lock on the folder until it ends. The next process that creates such a folder removes all folders
without a lock.
"""

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from conf.files import try_lock

FRESH = 60.0
"""Minimum age in seconds at which an unlocked folder is removed. A newer folder may still get its lock."""


class PrivateFolder:
    """A folder of mode 0700. Use in `with`, or call `remove`."""

    def __init__(self, kind: str, parent: Path | None = None):
        """Create and lock the folder. kind: prefix of its name. parent: None for the folder of temporary files."""
        parent = parent or Path(tempfile.gettempdir())
        remove_dead(kind, parent)
        self.path = Path(tempfile.mkdtemp(prefix=kind, dir=parent))
        self._lock = os.open(self.path, os.O_RDONLY)
        try_lock(self._lock)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)  # remaining files in a temporary folder are harmless
        os.close(self._lock)

    def __enter__(self) -> "PrivateFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def remove_dead(kind: str, parent: Path | None = None) -> None:
    """Remove this user's folders of this kind that no live process uses."""
    for folder in (parent or Path(tempfile.gettempdir())).glob(f"{kind}*"):
        with contextlib.suppress(OSError):  # another process removes it, or it is not a folder
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                state = os.fstat(lock)
                if state.st_uid == os.geteuid() and time.time() - state.st_mtime >= FRESH and try_lock(lock):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
