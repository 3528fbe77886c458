"""Cleans up after a Ray that a run started on its own machine, if the run's driver was killed.

Some of Ray's processes do not notice that their parent has become a zombie.

python -m cluster.node.sweep_ray FOLDER    waits until the driver closes its standard input. Then it kills this user's
                                           processes whose command line names the folder, and Ray processes with an open
                                           file in it. Then it removes the folder, and a minute later the agents'
                                           scratch folders.
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
"""Number of searches for processes to kill, and seconds between them."""


def sweep_ray(folder: Path) -> None:
    """Kill the processes of this folder's Ray, and remove the folder."""
    for _ in range(SWEEPS):
        found = [process for process in psutil.process_iter() if _uses(process, str(folder))]
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)  # a process that is ending may still write there
        if not found and not folder.exists():
            return
        time.sleep(PAUSE_SECONDS)


def _uses(process: psutil.Process, folder: str) -> bool:
    """Whether a live process of this user belongs to Ray in this folder, by command line or open file. Some of Ray's
    processes replace their command line.
    """
    with contextlib.suppress(psutil.Error, OSError):
        line = process.cmdline()
        if process.pid == os.getpid() or process.uids().real != os.getuid() or not line:
            return False
        # A process that only reads Ray's logs does not belong to Ray.
        if any(folder in word for word in line) and any("/ray/" in word for word in line):
            return True
        handles = os.scandir(f"/proc/{process.pid}/fd") if line[0].startswith("ray::") else ()
        return any(os.readlink(handle.path).startswith(f"{folder}/") for handle in handles)
    return False


if __name__ == "__main__":
    sys.stdin.buffer.read()
    sweep_ray(Path(sys.argv[1]))
    time.sleep(FRESH + 1.0)
    remove_dead(scratch_prefix())
