"""Time of a layer's kernels by class, from torch's profiler. On a CPU: of torch's operations.

Forward and the two halves of a split backward are profiled separately, so that the phase shows the purpose of a GEMM:
all GEMMs of the second half compute gradients of weights. Kernel names decide the class; names without a pattern are
`rest`.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.gpu.layer import Layer, synchronize

T = TypeVar("T")
CLASSES = (
    ("attention", r"flash|fmha|sdpa"),
    ("grouped products", r"GroupProblemShape|grouped|deep_gemm"),
    ("dense products", r"gemm|nvjet|cutlass|xmma|cublas|splitK|_(matmul|wgrad)_kernel|aten::(mm|addmm|bmm|baddbmm)"),
    ("SwiGLU", r"swiglu|silu"),
    ("casts", r"_(tiles|columns|both|blocks|e5m6|decode)_kernel|float8"),
    ("norms", r"norm(?!al)|GammaBeta"),
    ("permutation", r"index|embedding_?bag|gather|scatter|sort|scan|nonzero"),
)
"""The first that matches, upper or lower case. Our own are those of train/kernels/fp8."""
REST = "rest"
PHASES = ("forward", "inputs", "weights")
REPEATS = 3


def kind_of(name: str) -> str:
    """Class of a kernel or an operation."""
    return next((kind for kind, pattern in CLASSES if re.search(pattern, name, re.IGNORECASE)), REST)


def kernels(layer: Layer) -> dict[str, dict[str, float]]:
    """Seconds by phase (forward; backward's inputs and weights) and class, mean of a few runs."""
    totals = {phase: Counter() for phase in PHASES}
    for repeat in range(REPEATS + 1):
        found = {}
        y_BTD, found["forward"] = _profiled(layer.forward, layer.device)
        groups, found["inputs"] = _profiled(lambda y_BTD=y_BTD: layer.inputs(y_BTD), layer.device)
        _, found["weights"] = _profiled(lambda groups=groups: layer.weights(groups), layer.device)
        for phase, seconds in found.items() if repeat else ():  # the first starts the profiler
            totals[phase].update(seconds)
    return {phase: {kind: total / REPEATS for kind, total in sums.items()} for phase, sums in totals.items()}


def _profiled(work: Callable[[], T], device: torch.device) -> tuple[T, Counter[str]]:
    """What the work returns, and seconds by class."""
    on_cuda = device.type == "cuda"
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiler:
        result = work()
        synchronize(device)
    seconds: Counter[str] = Counter()
    for event in profiler.events():
        if on_cuda and event.device_type == DeviceType.CUDA:
            seconds[kind_of(event.name)] += event.time_range.elapsed_us() / 1e6
        elif not on_cuda and event.device_type == DeviceType.CPU:
            seconds[kind_of(event.name)] += event.self_cpu_time_total / 1e6
    return result, seconds
