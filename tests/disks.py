"""Disks of a test: small, full, read-only. They need root."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of this size (3m) in a new folder."""
    folder.mkdir()
    with _mounted(["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], folder):
        yield folder


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Whoever opens a file in this folder from now on can only read; files that are open stay as they are."""
    with tempfile.TemporaryDirectory() as aside, _mounted(["--bind", str(folder), aside], Path(aside)):
        # Made read-only where nobody writes: a mount through which somebody does would be busy. Another of it is read-only at once.
        subprocess.run(["mount", "-o", "remount,bind,ro", aside], check=True)
        with _mounted(["--bind", aside, str(folder)], folder):
            yield


@contextlib.contextmanager
def _mounted(arguments: list[str], folder: Path) -> Iterator[None]:
    if os.geteuid() != 0 or subprocess.run(["mount", *arguments], capture_output=True).returncode != 0:
        pytest.skip("needs root to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, left: int = 0) -> Path:
    """A file that takes all room of this disk but `left` bytes; remove it to have the room again."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    if left:
        os.truncate(ballast, ballast.stat().st_size - left)
    return ballast
