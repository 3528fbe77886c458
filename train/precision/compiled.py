"""The casts of the CPU emulation as compiled code: `train/precision/casts.cpp`, built at the first use and kept.

The compiler is the machine's own (CXX, g++ or clang++), so that the loops use the widest vectors that the CPU has.  What is
built lies in $SLUICE_CACHE/kernels under the hash of all that went into it, the CPU's features among them.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from conf.errors import UserError
from train.precision.formats import E4M3, Cast, Format
from train.precision.quantize import Quantized, fitted

SOURCE = Path(__file__).with_name("casts.cpp")
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fwrapv"]
FLAGS += ["-shared", "-fPIC"]
"""Without contraction, so that a product is rounded before it is added to, as in the reference; integers wrap, as the bits of
what is not finite do."""
NATIVE = {"x86_64": ["-march=native", "-mprefer-vector-width=512"], "aarch64": ["-mcpu=native"]}
"""By machine: the widest vectors that the CPU has."""
CURE = "install g++ or clang++ (or name one in CXX), or set precision.fp8.compiled=false: the same bits, but slower"
MOVE = "set SLUICE_CACHE to a folder of yours whose files may run, or precision.fp8.compiled=false: the same bits, but slower"


class CompiledCasts:
    """`train.precision.quantize.EagerCasts` compiled: the same bits, signed zeros aside. CPU tensors only."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library

    def quantize(self, x_MK: Tensor, cast: Cast) -> Quantized:
        """See `train.precision.quantize.quantize`."""
        cast, shape = fitted(cast, x_MK), x_MK.shape
        if cast.format.dtype is None:
            q = torch.empty(*shape[:-1], 3 * -(-shape[-1] // 2), dtype=torch.uint8)
        else:
            q = torch.empty(shape, dtype=cast.format.dtype)
        blocks = [-(-size // side) for size, side in zip(shape[-2:], cast.block, strict=True)]
        quantized = Quantized(q, torch.empty(*shape[:-2], *blocks), cast, shape)
        self._cast(x_MK, _codes(quantized), cast)
        return quantized

    def fake_quantize(self, x: Tensor | Quantized, cast: Cast, dtype: torch.dtype) -> Tensor:
        """See `train.precision.quantize.fake_quantize`."""
        assert dtype in (torch.bfloat16, torch.float32)
        cast, values = fitted(cast, x), torch.empty(x.shape, dtype=dtype)
        self._cast(x, _values(values, cast), cast)
        return values

    def dequantize(self, x: Quantized, dtype: torch.dtype) -> Tensor:
        """See `train.precision.quantize.dequantize`."""
        assert dtype in (torch.bfloat16, torch.float32)
        values = torch.empty(x.shape, dtype=dtype)
        x = _contiguous(x)
        self._library.decode_matrices(_codes(x), _values(values, x.cast), *_sizes(x.shape), torch.get_num_threads())
        return values

    def _cast(self, x: Tensor | Quantized, out: "_Matrices", cast: Cast) -> None:
        x = _contiguous(x)  # alive while it is read
        source = _codes(x) if isinstance(x, Quantized) else _values(x, Cast(E4M3, (1, 1), False))
        threads = torch.get_num_threads()
        self._library.cast_matrices(source, out, *_sizes(x.shape), cast.floor, cast.pow2, threads)


@cache
def load_casts() -> CompiledCasts:
    """The compiled casts, built if they are not there yet. Raises UserError where nothing can build, keep or load them."""
    path = _built()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(
            "SLUICE_CACHE", path.parent, f"must hold libraries that can be loaded: {error}", MOVE
        ) from error
    sizes = [c_int64, c_int64, c_int64]
    matrices = [ctypes.POINTER(_Matrices)] * 2
    library.cast_matrices.argtypes = [*matrices, *sizes, c_float, c_int32, c_int32]
    library.decode_matrices.argtypes = [*matrices, *sizes, c_int32]
    library.cast_matrices.restype = library.decode_matrices.restype = None
    return CompiledCasts(library)


def _built() -> Path:
    """The shared library for this source, compiler and CPU."""
    compiler = _compiler()
    openmp = ["-fopenmp"] if sys.platform.startswith("linux") else []
    command = [*compiler, *FLAGS, *NATIVE.get(platform.machine(), []), *openmp]
    version = subprocess.run([*compiler, "--version"], capture_output=True).stdout
    key = hashlib.sha256(b"\0".join([" ".join(command).encode(), version, _cpu(), SOURCE.read_bytes()])).hexdigest()
    folder = Path(os.environ.get("SLUICE_CACHE") or Path.home() / ".cache" / "sluice") / "kernels"
    path = folder / f"casts_{key[:16]}.so"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:  # ranks may build at once; the last one's stays
                _build(command, Path(scratch) / path.name).replace(path)
    except OSError as error:
        raise UserError("SLUICE_CACHE", folder.parent, f"cannot be written: {error.strerror}", MOVE) from error
    return path


def _compiler() -> list[str]:
    """The command of the C++ compiler: CXX if it is set, else the first at hand."""
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in [asked] if asked else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(command[0]):
            return command
    lack = f"CXX={asked[0]} is not on the PATH" if asked else "this machine has none"
    raise UserError("precision.fp8.compiled", True, f"needs a C++ compiler, and {lack}", CURE)


def _build(command: list[str], library: Path) -> Path:
    """Runs the compiler; returns the library."""
    done = subprocess.run([*command, "-o", str(library), str(SOURCE)], capture_output=True, text=True)
    if done.returncode:
        rule = f"{command[0]} cannot build {SOURCE.name}: {done.stderr.strip()[-1000:]}"
        raise UserError("precision.fp8.compiled", True, rule, CURE)
    return library


def _cpu() -> bytes:
    """What this CPU can do: machines that share a home may differ."""
    lines = Path("/proc/cpuinfo").read_bytes().splitlines() if sys.platform.startswith("linux") else []
    features = [line for line in lines if line.startswith((b"flags", b"Features"))]
    return features[0] if features else platform.processor().encode()


class _Format(ctypes.Structure):
    """`Format` of casts.cpp."""

    _fields_ = [("mantissa", c_int32), ("min_exponent", c_int32), ("width", c_int32), ("max", c_float)]

    @classmethod
    def of(cls, format: Format) -> "_Format":
        return cls(format.mantissa, format.min_exponent, 12 if format.dtype is None else 8, format.max)


class _Matrices(ctypes.Structure):
    """`Matrices` of casts.cpp: where values or codes lie in memory."""

    _fields_ = [
        ("values", c_void_p), ("fp32", c_int32), ("codes", c_void_p), ("scale", c_void_p),
        ("block_rows", c_int64), ("block_columns", c_int64), ("format", _Format),
    ]  # fmt: skip


def _values(x: Tensor, cast: Cast) -> _Matrices:
    return _Matrices(x.data_ptr(), x.dtype == torch.float32, None, None, *cast.block, _Format.of(cast.format))


def _codes(x: Quantized) -> _Matrices:
    return _Matrices(None, 0, x.q.data_ptr(), x.scale.data_ptr(), *x.cast.block, _Format.of(x.cast.format))


def _contiguous(x: Tensor | Quantized) -> Tensor | Quantized:
    """The same row by row in memory, values in bf16 or fp32."""
    if isinstance(x, Quantized):
        return Quantized(x.q.contiguous(), x.scale.contiguous(), x.cast, x.shape)
    return x.contiguous() if x.dtype in (torch.bfloat16, torch.float32) else x.float().contiguous()


def _sizes(shape: torch.Size) -> tuple[int, int, int]:
    """Matrices, rows and columns."""
    return shape[:-2].numel(), shape[-2], shape[-1]
