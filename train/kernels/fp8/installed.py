"""Looks up the FP8 software for a Hopper or Blackwell GPU, and finds incompatibilities."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from conf.errors import UserError

DEEP_GEMM = "sgl-deep-gemm"
"""DeepGEMM's package on PyPI. Its module is deep_gemm."""
DEEP_GEMM_OLDEST, DEEP_GEMM_NEWEST = (0, 1, 4), (0, 1, 5)
"""Oldest DeepGEMM version with the K-grouped FP8 kernel, and newest version that works with TORCH_OF_DEEP_GEMM."""
TORCH_OF_DEEP_GEMM = (2, 11)
"""The torch version for DeepGEMM. With torch 2.12 and 2.13, DeepGEMM's first call aborts (PyObjectSlot)."""
CUDA_OF_DEEP_GEMM = 13
OTHER_BUILD = "another build"
"""Version shown if the installed module deep_gemm is not from the package DEEP_GEMM. The probe tests such a module too.
"""
OLDEST_CUDA = (12, 9)
"""The first CUDA version whose cuBLASLt has blockwise FP8 GEMMs."""
OLDEST_NVCC = (12, 3)
"""Oldest nvcc version that DeepGEMM supports."""
CAPABILITY = (9, 0)
"""Compute capability of Hopper GPUs (one scale for 128 values)."""
MX_CAPABILITIES = (10, 0), (10, 3)
"""Blackwell capabilities that torch's grouped MXFP8 GEMMs support."""

WITHOUT_PACKAGES = "use precision.fp8.backend=triton, which needs no extra package, or pip install 'torch>=2.11,<2.12' sgl-deep-gemm==0.1.5 (the extra [fp8])"
TOOLKIT = (
    "use precision.fp8.backend=triton, which needs no nvcc, or "
    "install a CUDA 13 toolkit and set CUDA_HOME to its folder, the one that holds bin/nvcc"
)
CHOOSE_BF16 = "choose precision=bf16"


@dataclass(frozen=True)
class InstalledVersions:
    """Versions of the software and hardware for FP8 GEMMs; None if not installed."""

    torch: str
    cuda: str | None
    """The CUDA version that torch was built with."""
    abi: bool
    """Whether torch is built with C++11's ABI, as DeepGEMM is."""
    scaled_mm: bool
    """Whether torch has scaled_mm, the matmul of quantised matrices."""
    triton: str | None
    deep_gemm: str | None
    nvcc: str | None
    """Version of nvcc, the compiler in `toolkit`."""
    toolkit: str | None
    """DeepGEMM's CUDA toolkit: CUDA_HOME, CUDA_PATH, the folder of nvcc, or /usr/local/cuda."""
    nvrtc: bool
    """Whether DeepGEMM compiles with NVRTC instead of nvcc (DG_JIT_USE_NVRTC)."""
    driver: str | None
    """The newest CUDA version that the driver supports."""
    gpu: str | None
    capability: tuple[int, int] | None

    def __str__(self) -> str:
        """Returns all versions in one line."""
        cuda, abi = f"CUDA {self.cuda}", "C++11's ABI" if self.abi else "the ABI before C++11"
        compiler = f"nvcc {self.nvcc or 'none'} in {self.toolkit or 'no CUDA_HOME'}"
        driver = f"driver for CUDA {self.driver or '?'}"
        gpu = (
            f"{self.gpu} of compute capability {'.'.join(map(str, self.capability))}"
            if self.gpu and self.capability
            else "no GPU"
        )
        packages = f"triton {self.triton or 'none'}, {DEEP_GEMM} {self.deep_gemm or 'none'}"
        return f"torch {self.torch} ({cuda}, {abi}), {packages}, {compiler}, {driver}, {gpu}"


def look_up_versions(device: int | None = None) -> InstalledVersions:
    """Looks up this machine's `InstalledVersions`. Initialises CUDA if possible.

    device: index of the GPU; None: the current GPU.
    """
    import torch
    from torch.nn import functional as F

    toolkit, usable = _toolkit(), torch.cuda.is_available()
    return InstalledVersions(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        abi=torch.compiled_with_cxx11_abi(),
        scaled_mm=hasattr(F, "scaled_mm"),
        triton=version("triton"),
        deep_gemm=version(DEEP_GEMM) or (OTHER_BUILD if importlib.util.find_spec("deep_gemm") else None),
        nvcc=None if toolkit is None else _nvcc(toolkit),
        toolkit=toolkit,
        nvrtc=os.environ.get("DG_JIT_USE_NVRTC", "0") not in ("", "0"),
        driver=_driver(),
        gpu=torch.cuda.get_device_name(device) if usable else None,
        capability=torch.cuda.get_device_capability(device) if usable else None,
    )


def misfits(found: InstalledVersions, deep_gemm: bool, mx: bool = False) -> list[tuple[str, str]]:
    """Returns the incompatibilities, each with its fix.

    deep_gemm: whether DeepGEMM computes the grouped GEMMs. mx: whether 32 values share a scale.
    """
    bad: list[tuple[str, str]] = []
    if found.gpu is None:
        bad.append(("torch sees no GPU", "use cluster.device=cpu"))
    elif mx and found.capability not in MX_CAPABILITIES:
        other = "choose precision=fp8" if found.capability == CAPABILITY else CHOOSE_BF16
        bad.append((f"{found.gpu} has no MXFP8 GEMMs; B200, B300, GB200 and GB300 have them", other))
    elif not mx and found.capability != CAPABILITY:
        other = "choose precision=mxfp8 or bf16" if found.capability in MX_CAPABILITIES else CHOOSE_BF16
        bad.append((f"{found.gpu} has no blockwise FP8 GEMMs; H100, H800 and H200 have them", other))
    if not found.scaled_mm:
        bad.append((f"torch {found.torch} has no torch.nn.functional.scaled_mm", "pip install 'torch>=2.11'"))
    if _numbers(found.cuda) < OLDEST_CUDA:
        bad.append(
            (f"torch is built with CUDA {found.cuda}, and 12.9 or later is needed", "install a build with CUDA 13")
        )
    if found.triton is None:
        bad.append(("triton is not installed", "install the CUDA build of torch, which includes triton"))
    return bad + (_of_deep_gemm(found) if deep_gemm else [])


def require_fit(deep_gemm: bool, mx: bool = False) -> None:
    """Raises UserError if installed software is incompatible. deep_gemm, mx: see `misfits`."""
    found = look_up_versions()
    if bad := misfits(found, deep_gemm, mx):
        raise refusal(bad, str(found), "mxfp8" if mx else "fp8")


def _of_deep_gemm(found: InstalledVersions) -> list[tuple[str, str]]:
    bad = [] if found.deep_gemm == OTHER_BUILD else _of_package(found)
    if found.nvrtc:
        return bad  # the probe tests whether DeepGEMM's kernel compiles
    if found.nvcc is None:
        where = f"there is none in {found.toolkit}" if found.toolkit else "no CUDA_HOME, PATH or /usr/local/cuda has it"
        bad.append((f"DeepGEMM compiles its kernels with nvcc at the first call, and {where}", TOOLKIT))
    elif _numbers(found.nvcc) < OLDEST_NVCC:
        bad.append((f"nvcc in {found.toolkit} is {found.nvcc}, and DeepGEMM needs 12.3 or later", TOOLKIT))
    return bad


def _of_package(found: InstalledVersions) -> list[tuple[str, str]]:
    bad: list[tuple[str, str]] = []
    oldest, newest = (".".join(map(str, numbers)) for numbers in (DEEP_GEMM_OLDEST, DEEP_GEMM_NEWEST))
    if found.deep_gemm is None:
        bad.append((f"{DEEP_GEMM} is not installed", WITHOUT_PACKAGES))
    elif not DEEP_GEMM_OLDEST <= _numbers(found.deep_gemm) <= DEEP_GEMM_NEWEST or "post" in found.deep_gemm:
        bad.append((f"{DEEP_GEMM} is {found.deep_gemm}, and {oldest} to {newest} are supported", WITHOUT_PACKAGES))
    if _numbers(found.torch)[:2] != TORCH_OF_DEEP_GEMM:
        bad.append(
            (
                f"torch is {found.torch}, and {DEEP_GEMM} {oldest} to {newest} run only with torch 2.11",
                WITHOUT_PACKAGES,
            )
        )
    if _numbers(found.cuda)[:1] != (CUDA_OF_DEEP_GEMM,):
        bad.append((f"torch is built with CUDA {found.cuda}, and {DEEP_GEMM} with CUDA 13", WITHOUT_PACKAGES))
    if not found.abi:
        bad.append((f"torch is built without C++11's ABI, and {DEEP_GEMM} with it", WITHOUT_PACKAGES))
    return bad


def refusal(bad: list[tuple[str, str]], found: str, value: str = "fp8") -> UserError:
    """Returns one error for all problems. found: the installed versions. value: name of the precision."""
    problems = "".join(f"\n        - {problem}" for problem, _ in bad)
    rule = f"needs compatible packages:{problems}\n        found: {found}"
    return UserError("precision", value, rule, ";\n        ".join(dict.fromkeys(cure for _, cure in bad)))


def version(package: str) -> str | None:
    """Returns a package's installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(text: str | None) -> tuple[int, ...]:
    """Returns up to three numbers at the start of a version text."""
    return tuple(map(int, re.findall(r"\d+", (text or "").partition("+")[0])[:3]))


def _toolkit() -> str | None:
    """Returns the folder that DeepGEMM uses as CUDA toolkit, or None."""
    if given := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return given
    if (nvcc := shutil.which("nvcc")) is not None:
        return str(Path(nvcc).parent.parent)
    return "/usr/local/cuda" if Path("/usr/local/cuda").exists() else None


def _nvcc(toolkit: str) -> str | None:
    """Returns the version of nvcc; None if nvcc does not run."""
    try:
        said = subprocess.run(
            [f"{toolkit}/bin/nvcc", "--version"], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    number = re.search(r"release ([\d.]+)", said.stdout)
    return number and number[1]


def _driver() -> str | None:
    """Returns the newest CUDA version that the driver supports, or None."""
    number = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"
