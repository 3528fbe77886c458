"""This machine's processor: its name, and settings for faster training, which must be set before torch is imported."""

import ctypes
import os
import platform
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


SPINS = "10000"
"""Spin iterations, about ten microseconds, of an OpenMP thread that waits for the next parallel region. The default is
milliseconds, which slows other processes on the same cores: with ten processes a matmul took three times as long."""
PRIMITIVES = "16"
"""Number of prepared matmuls that torch caches, in addition to the 1024 in oneDNN's own cache. torch's default, also
1024, needs another 160 MB in a run of `tiny` and makes no step faster."""

CUDA_VARIABLES = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "TORCH_NCCL_HIGH_PRIORITY": "1"}
"""A step uses up to ten streams, and CUDA gives them eight connections to the device; streams that share a connection
wait for each other. NCCL uses its own streams. Without the second variable they do not have the priority of the
experts' dispatch and combine."""


def tune_cpu() -> None:
    """Let waiting threads sleep, keep freed memory in the process, and cache prepared matmuls only once."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    os.environ.setdefault("LRU_CACHE_CAPACITY", PRIMITIVES)
    _tune_malloc()


def tune_gpu() -> None:
    """Set the variables that CUDA and NCCL read at their start, unless the user has set them."""
    for name, value in CUDA_VARIABLES.items():
        os.environ.setdefault(name, value)


def threads_of(given: int, ranks: int) -> int:
    """Threads of each of `ranks` ranks on this machine: as given, or for 0 an equal share of the cores."""
    return given or max(1, len(os.sched_getaffinity(0)) // ranks)


def cpu_name() -> str:
    """Name of this machine's processor, from the system."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _tune_malloc() -> None:
    """Make glibc's allocator, if present, reuse memory instead of unmapping it.

    Otherwise a step returns its memory to the kernel and faults it in again. -1 turns trimming off; the largest other
    value, 2 GB, is less than a step of a large model frees at once.
    """
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if hasattr(libc, "mallopt"):
        for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20)):
            libc.mallopt(name, value)
