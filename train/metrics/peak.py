"""Finds the peak rate of a device in FLOP/s. MFU is a fraction of this rate.

For data-centre GPUs, it is the manufacturer's figure for dense bf16 GEMMs, even if GEMMs run in FP8. The paper does the
same (ISCA paper 5.1.2: 432 TFLOPS are 43.7 % of an H800's 989 TFLOPS). For other devices, it is the rate of the fastest
of a few plain GEMMs.

A measurement on a busy machine is too low, but never too high. So a cache folder stores the highest rate.
"""

import json
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from conf.files import atomic_write_json
from train.kernels.cpu.processor import cpu_name
from train.model.operations import Kernels

NAMED_PEAKS = (
    (r"\bB200\b", 2250e12),
    (r"\bH200\b(?!.*NVL)", 989e12),
    (r"\bH800\b(?!.*PCIe)", 989e12),
    (r"\bH100\b(?!.*(PCIe|NVL))", 989e12),
    (r"\bA100\b", 312e12),
)
"""Manufacturer's figures by pattern of the CUDA device name."""
MATMUL_SIZES = (256, 512, 1024, 2048, 4096, 8192)
MATMUL_TRIES = 3
PEAK_SECONDS = 0.25
IMPOSSIBLE = 1e17
"""A rate that no device reaches; higher cached rates are ignored."""


class Peak(NamedTuple):
    flops: float
    """Peak rate in FLOP/s."""
    label: str
    """Describes the origin of the rate."""


def peak_flops(
    device: torch.device, dtype: torch.dtype, kernels: Kernels, *, given: float = 0.0, cache: Path | None = None
) -> Peak:
    """Returns `given` if it is set, else the manufacturer's figure, else the highest measured rate.

    - dtype: format of the GEMMs; FP8 counts as bf16.
    - kernels: compute the GEMMs.
    - cache: folder of the highest rates; None: no cache.
    """
    if given > 0:
        return Peak(given, "log.peak_flops")
    dtype = torch.bfloat16 if dtype.itemsize == 1 else dtype
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        if (known := named_peak(name)) is not None:
            return Peak(known, f"{name}, bf16 figure of the manufacturer")
    now = Peak(measured_peak(device, dtype, kernels), f"measured {_format(dtype)} GEMM")
    return now if cache is None else _best_seen(cache / "peaks", _kind(device, dtype, kernels), now)


def named_peak(name: str) -> float | None:
    """Returns the manufacturer's bf16 FLOP/s of a GPU, or None."""
    return next((flops for pattern, flops in NAMED_PEAKS if re.search(pattern, name) and "MIG" not in name), None)


def _format(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(device: torch.device, dtype: torch.dtype, kernels: Kernels) -> dict[str, Any]:
    """Returns the properties that must be equal in comparable measurements."""
    on_cuda, compiled = device.type == "cuda", dtype == torch.bfloat16 and "products" in kernels.parts
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else cpu_name(),
        "threads": 0 if on_cuda else torch.get_num_threads(),
        "dtype": _format(dtype),
        "code": "compiled" if compiled else f"torch {torch.__version__}",
    }


def _best_seen(folder: Path, kind: dict[str, Any], now: Peak) -> Peak:
    """Returns the higher of the cached rate and the new rate `now`, and stores it.

    Measurements with the same `kind` (device, threads, dtype and code) share a file, which is replaced atomically.
    """
    path = folder / (re.sub(r"[^A-Za-z0-9.]+", "_", " ".join(map(str, kind.values()))).strip("_")[:200] + ".json")
    kept, problem = _read_kept(path, kind)
    if kept >= now.flops:
        return Peak(kept, f"best {kind['dtype']} GEMM so far, stored in {path}; {now.flops / 1e12:.3g} TFLOP/s now")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, kind | {"flops": now.flops})
    except OSError as error:
        problem = f"; it cannot be stored for later runs in {path}: {error.strerror}"
    return Peak(now.flops, f"{now.label}{f', {kept / 1e12:.3g} TFLOP/s before' if kept else ''}{problem}")


def _read_kept(path: Path, kind: dict[str, Any]) -> tuple[float, str]:
    """Returns the cached rate, or 0 if there is none, and a text about an error when reading the cache."""
    try:
        found = json.loads(path.read_bytes())
        flops = float(found.pop("flops"))
        if found == kind and 0 < flops < IMPOSSIBLE:
            return flops, ""
    except FileNotFoundError:
        return 0.0, ""
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        pass  # the run can continue without this file
    return 0.0, f"; the figure stored in {path} could not be read and is replaced"


def measured_peak(device: torch.device, dtype: torch.dtype, kernels: Kernels, budget: float = PEAK_SECONDS) -> float:
    """Measures the highest rate of square GEMMs of growing size, within about `budget` seconds.

    Half of the budget is for a single thread. On a busy machine, threads that wait for each other can be slower.
    """
    if device.type != "cpu" or torch.get_num_threads() == 1:
        return _best_rate(device, dtype, kernels, budget)
    rate, threads = _best_rate(device, dtype, kernels, budget / 2), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return max(rate, _best_rate(device, dtype, kernels, budget / 2))
    finally:
        torch.set_num_threads(threads)


def _best_rate(device: torch.device, dtype: torch.dtype, kernels: Kernels, budget: float) -> float:
    rate, used, deadline = 0.0, 0.0, time.perf_counter() + budget
    size, pair = 0, []
    for size in MATMUL_SIZES:
        pair = [torch.randn(size, size, device=device).to(dtype) for _ in range(2)]
        best = min(_seconds(*pair, kernels=kernels) for _ in range(MATMUL_TRIES))
        rate = max(rate, 2 * size**3 / best)
        used += (
            MATMUL_TRIES * best
        )  # an estimate instead of clock time, because the first GEMM of a size may load a kernel
        if used + MATMUL_TRIES * 8 * best > budget:  # a GEMM of twice the size takes eight times as long
            break
    while time.perf_counter() < deadline:  # the fastest GEMM was interrupted least
        rate = max(rate, 2 * size**3 / _seconds(*pair, kernels=kernels))
    return rate


def _seconds(a: torch.Tensor, b: torch.Tensor, kernels: Kernels) -> float:
    started = time.perf_counter()
    kernels.matmul(a, b.t(), a.dtype)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - started
