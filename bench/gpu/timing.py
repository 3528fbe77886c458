"""Times on the device's own clock."""

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


WATCHED = {
    "clocks.sm": "clock (MHz)",
    "clocks.mem": "memory clock (MHz)",
    "power.draw": "power (W)",
    "temperature.gpu": "temperature (C)",
}
"""What nvidia-smi is asked, and what it is called here."""


@contextmanager
def watched_card(machine: Machine) -> Iterator[dict[str, float | str]]:
    """Filled at the end of the block with the medians of a card's clocks, power and temperature; empty without nvidia-smi."""
    seen: dict[str, float | str] = {}
    if not machine.on_gpu or shutil.which("nvidia-smi") is None:
        yield seen
        return
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(WATCHED)}",
        "--format=csv,noheader,nounits",
        f"--id={machine.device.index}",
        "--loop-ms=200",
    ]
    watcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield seen
    finally:
        watcher.terminate()
        said, _ = watcher.communicate()
    seen |= medians(said)


def medians(said: str) -> dict[str, float | str]:
    """Of each column of nvidia-smi's lines; what it does not know stands there as it says it."""
    columns = list(
        zip(*(line.split(", ") for line in said.splitlines() if line.count(",") == len(WATCHED) - 1), strict=True)
    )
    found: dict[str, float | str] = {}
    for name, column in zip(WATCHED.values(), columns, strict=False):
        numbers = [float(word) for word in column if word.replace(".", "", 1).isdigit()]
        found[name] = statistics.median(numbers) if numbers else column[0]
    return found
