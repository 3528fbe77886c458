"""The compiled libraries of a CPU, and whether this machine can use them.

They are for bf16, on CPUs with AVX-512 or AVX2. Without these features or a C++ compiler, torch operations do the same
work; the compiled code is tested against them. Matmuls also use torch if it is faster (`compiled_matmuls_pay`).
train/kernels/choice.py decides which kernels a run uses.
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
"""The C++ files, each a library."""
SLOW_SHARE = 0.75
"""Fraction of the FMA rate below which compiled matmuls are faster: torch's reach 90 % of the CPU's bf16 rate, compiled
matmuls 80 % of the FMA rate."""


@cache
def why_absent() -> str | None:
    """The reason why this machine cannot use the libraries, None if it can. The first call on a machine builds them,
    which takes some seconds."""
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
    """Whether compiled matmuls, with fp32's FMA, are faster on this CPU than torch's, with the CPU's bf16 instructions.

    A dot product of bf16 pairs does the work of two FMAs. On some CPUs it takes the time of two FMAs, on others of
    four. The CPU's name does not tell, so the rate is measured; both cases are far from the threshold. With AMX, torch
    is always faster.

    measured: false uses only the CPU's reported features, the same in every run: compiled if it has no bf16
    instructions. The environment variable SLUICE_PRODUCTS=compiled or torch overrides the answer.
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
    """The library of this name. Raises UserError if it cannot be built, stored or loaded."""
    return load_library(source(name, "cluster.compiled", "cluster.compiled=false: torch's operations, slower"))


_bf16_rate = Kernel(partial(library, "products"), "bf16_rate", ctypes.c_double)


def source(name: str, field: str, without: str) -> CppSource:
    """A library of LIBRARY_NAMES as a `CppSource`, with the caller's error texts."""
    here = Path(__file__).parent
    flags = ("-ffp-contract=off",)  # FMA instructions only where the code asks for them
    return CppSource(here / f"{name}.cpp", field, without, flags, (here / "tiles.h", here / "vectors.h"))
