"""Finds this machine's processor name, and tunes settings before torch is imported."""

import ctypes
import os
import platform
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


SPINS = "10000"
"""Number of spin iterations of an OpenMP thread before it sleeps: about ten microseconds. The default of milliseconds
slows other processes on the same cores.
"""
PRIMITIVES = "16"
"""Size of torch's cache of oneDNN primitives (matmuls prepared for one shape). torch's default of 1024 needs 160 MB
more in a run of `tiny` and is not faster.
"""

CUDA_VARIABLES = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "TORCH_NCCL_HIGH_PRIORITY": "1"}
"""Environment variables for CUDA and NCCL. A step uses up to ten streams; with CUDA's default of eight connections,
some would wait for each other. Dispatch and combine need NCCL's streams at high priority.
"""


def tune_cpu() -> None:
    """Let waiting threads sleep soon, reuse freed memory, and limit the oneDNN cache."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    os.environ.setdefault("LRU_CACHE_CAPACITY", PRIMITIVES)
    _tune_malloc()


def tune_gpu() -> None:
    """Set the variables for CUDA and NCCL, except those that the user has set."""
    for name, value in CUDA_VARIABLES.items():
        os.environ.setdefault(name, value)


def threads_of(given: int, ranks: int) -> int:
    """Returns the number of threads of a rank: `given`, or if it is 0, an equal part of this machine's cores.

    ranks: number of ranks on this machine.
    """
    return given or max(1, len(os.sched_getaffinity(0)) // ranks)


def cpu_name() -> str:
    """Returns the processor's name, as the system reports it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _tune_malloc() -> None:
    """Let glibc's allocator reuse freed memory instead of unmapping it. Does nothing without glibc.

    Otherwise each step would allocate its memory again by page faults. A trim threshold of -1 means that no memory is
    returned; other thresholds are at most 2 GB.
    """
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if hasattr(libc, "mallopt"):
        for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20)):
            libc.mallopt(name, value)
