"""The processor of this machine: its name, and settings that make training faster, made before torch is imported."""

import ctypes
import os
import platform
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


SPINS = "10000"
"""Turns, some ten microseconds, that an OpenMP thread waits awake for the next parallel region. The default is
milliseconds, which other processes on the same cores pay for: with ten of them a product took three times as long."""
PRIMITIVES = "16"
"""Products that torch keeps prepared, beside the 1024 that oneDNN itself keeps. torch's default, 1024 as well, holds
another 160 MB in a run of `tiny` and makes no step faster."""

CUDA_VARIABLES = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "TORCH_NCCL_HIGH_PRIORITY": "1"}
"""A step uses up to ten streams, and CUDA gives them eight connections to the device: streams that share a connection wait for each
other. NCCL runs on streams of its own; without the second variable they lose the priority of the exchange of experts' rows."""


def tune_cpu() -> None:
    """Let waiting threads sleep, keep freed memory in the process, and prepared products once."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    os.environ.setdefault("LRU_CACHE_CAPACITY", PRIMITIVES)
    _tune_malloc()


def tune_gpu() -> None:
    """Set the variables that CUDA and NCCL read when they start, where the user has not."""
    for name, value in CUDA_VARIABLES.items():
        os.environ.setdefault(name, value)


def threads_of(given: int, ranks: int) -> int:
    """Threads of each of so many ranks of this machine: as given, or for 0 an equal share of the cores."""
    return given or max(1, len(os.sched_getaffinity(0)) // ranks)


def cpu_name() -> str:
    """The processor of this machine, as the system calls it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _tune_malloc() -> None:
    """Set glibc's allocator, where there is one, to reuse instead of unmap, since a step otherwise returns its memory to the
    kernel and faults it in again. -1 switches trimming off; the largest number, 2 GB, is less than a step of a large
    model frees at once.
    """
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if hasattr(libc, "mallopt"):
        for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20)):
            libc.mallopt(name, value)
