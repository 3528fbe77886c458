"""Loads the compiled libraries for a CPU, and decides whether this machine can use them.

The libraries compute in bf16 and need AVX-512 or AVX2, and a C++ compiler. Otherwise torch operations do the same work.
Torch also computes the matmuls if it is faster.
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
"""Names of the C++ files in train/kernels/cpu, one library each."""
SLOW_SHARE = 0.75
"""Compiled matmuls are faster if bf16 instructions have less than this fraction of the rate of fp32 FMA instructions.
torch's matmuls reach 90 % of the bf16 rate, and compiled matmuls 80 % of the FMA rate.
"""


@cache
def why_absent() -> str | None:
    """Returns why this machine cannot use the libraries, or None. The first call builds them, which takes seconds."""
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

    Compiled matmuls use fp32 FMA instructions. torch's matmuls use bf16 instructions. A bf16 instruction does the work
    of two FMA instructions, but takes the time of two or four, depending on the CPU. So the function measures the rate.
    On CPUs with AMX, torch is always faster. SLUICE_PRODUCTS=compiled or SLUICE_PRODUCTS=torch overrides the decision.

    measured: whether to measure. If not, compiled matmuls are used on CPUs without bf16 instructions.
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
    """Loads the library with this name. Raises UserError if that fails."""
    return load_library(source(name, "cluster.compiled", "cluster.compiled=false: torch's operations, slower"))


_bf16_rate = Kernel(partial(library, "products"), "bf16_rate", ctypes.c_double)


def source(name: str, field: str, without: str) -> CppSource:
    """Returns a library's `CppSource`. field, without: see `CppSource`."""
    here = Path(__file__).parent
    flags = ("-ffp-contract=off",)  # use FMA instructions only where the code requests them
    return CppSource(here / f"{name}.cpp", field, without, flags, (here / "tiles.h", here / "vectors.h"))
