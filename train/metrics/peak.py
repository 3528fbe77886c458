"""The peak of a device in FLOP/s, which MFU is measured against.

For data-centre GPUs it is the maker's dense bf16 figure, also when products run in FP8: the paper counts against bf16
(ISCA 5.1.2: 432 TFLOPS non-causal is 43.7 % of an H800's 989). For everything else, a CPU above all, no such
figure is known, and the fastest of a few plain matrix products stands for it, made as training makes them.

A measurement on a busy machine is too low, never too high. So the best figure of a kind of device, number of threads, number
format and code is kept in the cache folder, and every start measures again, in the time that a start without a figure
takes: it may raise the figure. From the second start on, a busy moment no longer moves what MFU is measured against.
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
"""Names as CUDA reports them. PCIe and NVL cards of the H series are slower and get measured."""
PRODUCT_SIZES = (256, 512, 1024, 2048, 4096, 8192)
PRODUCT_TRIES = 3
PEAK_SECONDS = 0.25
IMPOSSIBLE = 1e17
"""FLOP/s that no device reaches; a kept figure like that is damage, and would stand for ever."""


class Peak(NamedTuple):
    flops: float
    """FLOP/s."""
    label: str
    """Where the figure comes from, for a person."""


def peak_flops(
    device: torch.device, dtype: torch.dtype, kernels: Kernels, *, given: float = 0.0, cache: Path | None = None
) -> Peak:
    """given (log.peak_flops) if it is set, else the maker's figure, else the best one measured so far, now included.

    dtype: format of the products; FP8 counts as bf16. kernels: what makes them. cache: folder that keeps the best figures; None keeps none. A
    measurement takes about 0.3 s. A kept figure that cannot be read or written is said in the label, and no more.
    """
    if given > 0:
        return Peak(given, "log.peak_flops")
    dtype = torch.bfloat16 if dtype.itemsize == 1 else dtype
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        if (known := named_peak(name)) is not None:
            return Peak(known, f"{name}, bf16 figure of its maker")
    now = Peak(measured_peak(device, dtype, kernels), f"measured {_format(dtype)} matrix product")
    return now if cache is None else _best_seen(cache / "peaks", _kind(device, dtype, kernels), now)


def named_peak(name: str) -> float | None:
    """The maker's dense bf16 FLOP/s of a GPU by the name that CUDA reports, None if unknown."""
    return next((flops for pattern, flops in NAMED_PEAKS if re.search(pattern, name) and "MIG" not in name), None)


def _format(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(device: torch.device, dtype: torch.dtype, kernels: Kernels) -> dict[str, Any]:
    """What measurements must have in common so that the best of them stands for all."""
    on_cuda, compiled = device.type == "cuda", dtype == torch.bfloat16 and "products" in kernels.parts
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else cpu_name(),
        "threads": 0 if on_cuda else torch.get_num_threads(),
        "dtype": _format(dtype),
        "code": "compiled" if compiled else f"torch {torch.__version__}",
    }


def _best_seen(folder: Path, kind: dict[str, Any], now: Peak) -> Peak:
    """The better of the kept figure and the one of now, which is then kept.

    A file per kind, replaced in one move. Of two processes that write at once the last one's figure stays, also if it is
    the lower one: a later start raises it again.
    """
    path = folder / (re.sub(r"[^A-Za-z0-9.]+", "_", " ".join(map(str, kind.values()))).strip("_")[:200] + ".json")
    kept, problem = _read_kept(path, kind)
    if kept >= now.flops:
        return Peak(
            kept, f"best {kind['dtype']} matrix product so far, kept in {path}; {now.flops / 1e12:.3g} TFLOP/s now"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, kind | {"flops": now.flops})
    except OSError as error:
        problem = f"; it cannot be kept for later runs in {path}: {error.strerror}"
    return Peak(now.flops, f"{now.label}{f', {kept / 1e12:.3g} TFLOP/s before' if kept else ''}{problem}")


def _read_kept(path: Path, kind: dict[str, Any]) -> tuple[float, str]:
    """The figure in the file, 0 without one; and what is wrong with the file, which is then written again."""
    try:
        found = json.loads(path.read_bytes())
        flops = float(found.pop("flops"))
        if found == kind and 0 < flops < IMPOSSIBLE:
            return flops, ""
    except FileNotFoundError:
        return 0.0, ""
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        pass  # whatever the file holds, training needs nothing of it
    return 0.0, f"; the figure kept in {path} could not be read and is replaced"


def measured_peak(device: torch.device, dtype: torch.dtype, kernels: Kernels, budget: float = PEAK_SECONDS) -> float:
    """Best rate of square matrix products of growing size within about `budget` seconds.

    On a busy machine CPU threads that wait for each other can be a hundred times slower than one thread alone, so half of
    the budget goes to a single thread; the better of the two stands.
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
    for size in PRODUCT_SIZES:
        pair = [torch.randn(size, size, device=device).to(dtype) for _ in range(2)]
        best = min(_seconds(*pair, kernels=kernels) for _ in range(PRODUCT_TRIES))
        rate = max(rate, 2 * size**3 / best)
        used += PRODUCT_TRIES * best  # not what passed on the clock: the first product of a size may load a kernel
        if used + PRODUCT_TRIES * 8 * best > budget:  # twice the size takes eight times as long
            break
    while time.perf_counter() < deadline:  # the best of many tries saw the fewest interruptions
        rate = max(rate, 2 * size**3 / _seconds(*pair, kernels=kernels))
    return rate


def _seconds(a: torch.Tensor, b: torch.Tensor, kernels: Kernels) -> float:
    started = time.perf_counter()
    kernels.product(a, b.t(), a.dtype)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - started
