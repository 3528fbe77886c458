"""The peak of a device in FLOP/s, which MFU is measured against.

For data-centre GPUs it is the maker's dense bf16 figure, also when products run in FP8: the paper counts against bf16
(ISCA 5.1.2: 432 TFLOPS non-causal is 43.7 % of an H800's 989). For everything else, a CPU above all, no such
figure is known, and the fastest of a few plain matrix products stands for it, made as training makes them.
"""

import re
import time
from typing import NamedTuple

import torch

from train.model.compiled_products import fastest_product

NAMED = (
    (r"\bB200\b", 2250e12),
    (r"\bH200\b(?!.*NVL)", 989e12),
    (r"\bH800\b(?!.*PCIe)", 989e12),
    (r"\bH100\b(?!.*(PCIe|NVL))", 989e12),
    (r"\bA100\b", 312e12),
)
"""Names as CUDA reports them. PCIe and NVL cards of the H series are slower and get measured."""
SIZES = (256, 512, 1024, 2048, 4096, 8192)
TRIES = 3
BUDGET_SECONDS = 0.25


class Peak(NamedTuple):
    flops: float
    """FLOP/s."""
    label: str
    """Where the figure comes from, for a person."""


def peak_flops(device: torch.device, dtype: torch.dtype, *, given: float = 0.0) -> Peak:
    """given (log.peak_flops) if it is set, else the maker's figure, else measured in under 0.3 s.

    dtype: format of the products; FP8 counts as bf16.
    """
    if given > 0:
        return Peak(given, "log.peak_flops")
    dtype = torch.bfloat16 if dtype.itemsize == 1 else dtype
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        if (known := named_peak(name)) is not None:
            return Peak(known, f"{name}, bf16 figure of its maker")
    return Peak(measured_peak(device, dtype), f"measured {str(dtype).removeprefix('torch.')} matrix product")


def named_peak(name: str) -> float | None:
    """The maker's dense bf16 FLOP/s of a GPU by the name that CUDA reports, None if unknown."""
    return next((flops for pattern, flops in NAMED if re.search(pattern, name) and "MIG" not in name), None)


def measured_peak(device: torch.device, dtype: torch.dtype, budget: float = BUDGET_SECONDS) -> float:
    """Best rate of square matrix products of growing size within about `budget` seconds.

    On a busy machine CPU threads that wait for each other can be a hundred times slower than one thread alone, so half of
    the budget goes to a single thread; the better of the two stands.
    """
    if device.type != "cpu" or torch.get_num_threads() == 1:
        return _best_rate(device, dtype, budget)
    rate, threads = _best_rate(device, dtype, budget / 2), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return max(rate, _best_rate(device, dtype, budget / 2))
    finally:
        torch.set_num_threads(threads)


def _best_rate(device: torch.device, dtype: torch.dtype, budget: float) -> float:
    rate, used, deadline = 0.0, 0.0, time.perf_counter() + budget
    for size in SIZES:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        best = min(_seconds(a, b) for _ in range(TRIES))
        rate = max(rate, 2 * size**3 / best)
        used += TRIES * best  # not what passed on the clock: the first product of a size may load a kernel
        if used + TRIES * 8 * best > budget:  # twice the size takes eight times as long
            break
    while time.perf_counter() < deadline:  # the best of many tries saw the fewest interruptions
        rate = max(rate, 2 * size**3 / _seconds(a, b))
    return rate


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    started = time.perf_counter()
    fastest_product(a, b.t(), a.dtype)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - started
