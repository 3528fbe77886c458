"""Times on the device's own clock."""

import statistics
import time
from collections.abc import Callable

import torch

from bench.gpu.machine import Machine

FLUSH = 256 * 2**20
"""Bytes that are written before every call on a GPU, so that its level-2 cache holds nothing of the call before."""


def median_seconds(work: Callable[[], object], machine: Machine, rounds: int = 20, warm: int = 3) -> float:
    """Median of the rounds, by CUDA events or on a CPU by the clock."""
    for _ in range(warm):
        work()
    if not machine.on_gpu:
        return statistics.median(_clocked(work) for _ in range(min(rounds, 5)))
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=machine.device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in events:
        flush.zero_()
        start.record()
        work()
        end.record()
    machine.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def _clocked(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
