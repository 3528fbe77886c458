"""Keep freed memory in the process: on CPU a training step otherwise returns it to the kernel and faults it in again."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def tune_malloc() -> bool:
    """Set glibc's allocator to reuse instead of unmap; call before torch allocates. False where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 << 20))
    return sum(libc.mallopt(name, value) for name, value in settings) == len(settings)
