"""Loads the compiled libraries for a CPU, and decides whether this machine can use them.

The libraries compute in bf16, on CPUs with AVX-512 or AVX2. On a CPU without these features, or without a C++ compiler,
torch operations do the same work. Tests compare the compiled code with the torch operations. Matmuls also use torch
where torch is faster (`compiled_matmuls_pay`). train/kernels/choice.py decides which kernels a run uses.
"""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

from conf.errors import UserError
from train.kernels.cpu.cpp_build import CppSource, cpu_features, has_avx2, load_library
from train.kernels.cpu.cpp_function import Kernel

LIBRARY_NAMES = ("adamw", "attention", "products", "rows")
"""Names of the C++ files in train/kernels/cpu. Each file becomes one library."""
SLOW_SHARE = 0.75
"""Compiled matmuls are faster if the CPU's bf16 instructions have less than this fraction of the rate of its fp32 FMA
instructions. torch's matmuls reach 90 % of the bf16 rate, and compiled matmuls reach 80 % of the FMA rate."""


@cache
def why_absent() -> str | None:
    """Returns the reason why this machine cannot use the libraries; None if it can.

    The first call on a machine builds the libraries, which takes some seconds.
    """
    if not has_avx2():
        return "this CPU has no AVX2"
    try:
        with ThreadPoolExecutor() as builders:  # each compiler uses one core
            list(builders.map(library, LIBRARY_NAMES))
    except UserError as error:
        return str(error)
    return None


@cache
def compiled_matmuls_pay(measured: bool = True) -> bool:
    """Returns whether compiled matmuls are faster than torch's matmuls on this CPU.

    Compiled matmuls use FMA instructions in fp32, and torch's matmuls use the CPU's bf16 instructions. A bf16
    instruction does the work of two FMAs. On some CPUs it takes the time of two FMAs, on other CPUs the time of four
    FMAs. The name of the CPU does not show which, so the function measures the rate. Both rates are far from the
    threshold. On CPUs with AMX, torch is always faster.

    measured: whether to measure. Without a measurement, the CPU's features decide, so every run makes the same
    decision: compiled matmuls are used if the CPU has no bf16 instructions. The environment variable
    SLUICE_PRODUCTS=compiled or SLUICE_PRODUCTS=torch overrides the decision.
    """
    if answer := os.environ.get("SLUICE_PRODUCTS"):
        if answer not in ("compiled", "torch"):
            raise UserError(
                "SLUICE_PRODUCTS",
                answer,
                "must be compiled or torch",
                "unset it to let Sluice measure the faster choice",
            )
        return answer == "compiled"
    features = cpu_features().split()
    return "amx_bf16" not in features and (_bf16_rate() < SLOW_SHARE if measured else "avx512_bf16" not in features)


@cache
def library(name: str) -> ctypes.CDLL:
    """Loads the library with this name. Raises UserError if it cannot be built, stored or loaded."""
    return load_library(source(name, "cluster.compiled", "cluster.compiled=false: torch's operations, slower"))


_bf16_rate = Kernel(partial(library, "products"), "bf16_rate", ctypes.c_double)


def source(name: str, field: str, without: str) -> CppSource:
    """Returns the `CppSource` of a library in LIBRARY_NAMES. field, without: see `CppSource`."""
    here = Path(__file__).parent
    flags = ("-ffp-contract=off",)  # use FMA instructions only where the code requests them
    return CppSource(here / f"{name}.cpp", field, without, flags, (here / "tiles.h", here / "vectors.h"))
