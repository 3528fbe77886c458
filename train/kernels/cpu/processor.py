"""Finds the name of this machine's processor, and applies settings for faster training before torch is imported."""

import ctypes
import os
import platform
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


SPINS = "10000"
"""Number of spin iterations of an OpenMP thread that waits for the next parallel region. They take about ten
microseconds. By default, a thread spins for milliseconds, which slows other processes on the same cores. With ten
processes, a matmul took three times as long."""
PRIMITIVES = "16"
"""Size of torch's cache of oneDNN primitives. A primitive is a matmul that is prepared for one shape. oneDNN itself
caches 1024 more. torch's default is 1024 too. This default needs 160 MB more memory in a run of `tiny`, and does not
make steps faster."""

CUDA_VARIABLES = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "TORCH_NCCL_HIGH_PRIORITY": "1"}
"""Environment variables for CUDA and NCCL. A step uses up to ten streams. By default CUDA has only eight connections to
the device, and streams that share a connection wait for each other. The second variable gives high priority to the
streams that NCCL creates. Dispatch and combine of the experts need this priority."""


def tune_cpu() -> None:
    """Let waiting threads sleep after a short time, let the process reuse freed memory, and limit torch's cache of
    oneDNN primitives."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    os.environ.setdefault("LRU_CACHE_CAPACITY", PRIMITIVES)
    _tune_malloc()


def tune_gpu() -> None:
    """Set the environment variables that CUDA and NCCL read when they start, except variables that the user has set."""
    for name, value in CUDA_VARIABLES.items():
        os.environ.setdefault(name, value)


def threads_of(given: int, ranks: int) -> int:
    """Returns the number of threads of a rank. If `given` is 0, the ranks of this machine share the cores equally.
    Otherwise the number is `given`.

    ranks: number of ranks on this machine.
    """
    return given or max(1, len(os.sched_getaffinity(0)) // ranks)


def cpu_name() -> str:
    """Returns the name of this machine's processor, as the system reports it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _tune_malloc() -> None:
    """Let glibc's allocator reuse freed memory instead of unmapping it. Does nothing on systems without glibc.

    Without this, each step would return its memory to the kernel, and page faults would allocate it again. A trim
    threshold of -1 means that no memory is returned. The largest other threshold is 2 GB, but a step of a large model
    frees more than 2 GB at once.
    """
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if hasattr(libc, "mallopt"):
        for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20)):
            libc.mallopt(name, value)
