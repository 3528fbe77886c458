"""The parts of a step that a CPU can run as compiled code: which there are, and whether this machine can have them.

They are for bf16 and CPUs with AVX-512 or AVX2. Where these or a C++ compiler are absent, the same is done by torch's
operations, which the code is tested against. So are matrix products where torch's are faster (`products_pay`). Who uses them is decided in train/kernels/choice.py.
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
"""Share of the rate of FMA: torch's products reach nine tenths of what a CPU has for bf16, compiled ones eight tenths
of FMA's."""


@cache
def why_absent() -> str | None:
    """Why this machine cannot have it, None if it can. The first call on a machine builds it, which takes some seconds."""
    if not has_avx2():
        return "this CPU has no AVX2"
    try:
        with ThreadPoolExecutor() as builders:  # one compiler uses one core
            list(builders.map(library, LIBRARY_NAMES))
    except UserError as error:
        return str(error)
    return None


@cache
def products_pay(measured: bool = True) -> bool:
    """Whether compiled products, made of fp32's FMA, are faster on this CPU than torch's, made of what it has for bf16.

    A dot product of bf16 pairs does the work of two FMAs. On some CPUs it takes the time of two, on others that of four,
    which their names do not tell: it is measured, and both are far from the border. Where AMX is, nothing comes near it.
    measured: false for what the CPU says of itself, the same in every run: where it has no bf16.
    SLUICE_PRODUCTS=compiled or torch answers instead.
    """
    if answer := os.environ.get("SLUICE_PRODUCTS"):
        if answer not in ("compiled", "torch"):
            raise UserError("SLUICE_PRODUCTS", answer, "must be compiled or torch", "unset it to have it measured")
        return answer == "compiled"
    features = cpu_features().split()
    return "amx_bf16" not in features and (_bf16_rate() < SLOW_SHARE if measured else "avx512_bf16" not in features)


@cache
def library(name: str) -> ctypes.CDLL:
    """Raises UserError where it cannot be built, kept or loaded."""
    return load_library(source(name, "cluster.compiled", "cluster.compiled=false: torch's operations, slower"))


_bf16_rate = Kernel(partial(library, "products"), "bf16_rate", ctypes.c_double)


def source(name: str, field: str, without: str) -> CppSource:
    """One of LIBRARY_NAMES as somebody asks for it, see `CppSource`."""
    here = Path(__file__).parent
    flags = ("-ffp-contract=off",)  # products and sums are one operation only where the code says so
    return CppSource(here / f"{name}.cpp", field, without, flags, (here / "tiles.h", here / "vectors.h"))
