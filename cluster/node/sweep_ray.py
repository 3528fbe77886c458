"""What is left of a Ray that a run started on its own machine when the run's driver was killed: some of its processes look by the
number of their parent whether it lives, and a dead one that nobody reaps keeps its number.

python -m cluster.node.sweep_ray FOLDER    waits for the end of its standard input, which the driver holds, and then ends all processes of this
                                           user that were told to use the folder, or are Ray's with a file of it open, and removes it; a minute
                                           later also what agents have left.
"""

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path

import psutil

from cluster.node.agent import scratch_prefix
from cluster.private_folder import FRESH, remove_dead

SWEEPS, PAUSE_SECONDS = 50, 0.1
"""Looks for such processes, as one may start another."""


def sweep_ray(folder: Path) -> None:
    """End the processes of a Ray that uses this folder, and remove it."""
    for _ in range(SWEEPS):
        found = [process for process in psutil.process_iter() if _uses(process, str(folder))]
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)  # a process that ends may still write there
        if not found and not folder.exists():
            return
        time.sleep(PAUSE_SECONDS)


def _uses(process: psutil.Process, folder: str) -> bool:
    """Whether it is a living process of this user and of such a Ray, whose agents put a title in the place of their command lines."""
    with contextlib.suppress(psutil.Error, OSError):
        line = process.cmdline()
        if process.pid == os.getpid() or process.uids().real != os.getuid() or not line:
            return False
        if any(folder in word for word in line) and any("/ray/" in word for word in line):  # no reader of its logs
            return True
        handles = os.scandir(f"/proc/{process.pid}/fd") if line[0].startswith("ray::") else ()
        return any(os.readlink(handle.path).startswith(f"{folder}/") for handle in handles)
    return False


if __name__ == "__main__":
    sys.stdin.buffer.read()
    sweep_ray(Path(sys.argv[1]))
    time.sleep(FRESH + 1.0)
    remove_dead(scratch_prefix())
