"""The peak of a device in FLOP/s, which MFU is measured against.

For data-centre GPUs it is the maker's dense bf16 figure, also when products run in FP8: the paper counts against bf16
(ISCA 5.1.2: 432 TFLOPS non-causal is 43.7 % of an H800's 989). For everything else, a CPU above all, no such
figure is known, and the fastest of a few plain matrix products stands for it.
"""

import re
import time
from typing import NamedTuple

import torch

NAMED = (
    (r"\bB200\b", 2250e12),
    (r"\bH200\b(?!.*NVL)", 989e12),
    (r"\bH800\b(?!.*PCIe)", 989e12),
    (r"\bH100\b(?!.*(PCIe|NVL))", 989e12),
    (r"\bA100\b", 312e12),
)
"""Names as CUDA reports them. PCIe and NVL cards of the H series are slower and get measured."""
SIZES = (256, 512, 1024, 2048, 4096, 8192)
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
    """Best rate of square matrix products of growing size within about `budget` seconds."""
    best, deadline = 0.0, time.perf_counter() + budget
    with torch.no_grad():
        for size in SIZES:
            a, b = (torch.randn(size, size, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
            seconds = min(_seconds(a, b) for _ in range(2))  # the first one may load a library
            best = max(best, 2 * size**3 / seconds)
            # A product of twice the size takes eight times as long, and runs twice.
            if time.perf_counter() + 2 * 8 * seconds > deadline:
                break
    return best


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    started = time.perf_counter()
    a @ b
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - started
