"""Compiles C++ sources at their first use, and caches the libraries in $SLUICE_CACHE/kernels.

A compiler on this machine (CXX, g++ or clang++) builds them. A library's name is a hash of all that determines its
code, including the CPU's features. Sluice loads no library that another user could have written.
"""

import ctypes
import grp
import hashlib
import os
import platform
import pwd
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cluster.comm_ring import got_on
from conf.errors import UserError

COMPILER_FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fwrapv", "-shared", "-fPIC"]
"""Compiler flags. The code that rounds the bits of non-finite values overflows, so it needs -fwrapv."""
NATIVE = {"x86_64": ["-march=native", "-mprefer-vector-width=512"], "aarch64": ["-mcpu=native"]}
"""Maps the machine type to flags for the CPU's widest vectors."""


CPU_LIMITS = {
    "avx2": (("avx512", "amx"), ("-mno-avx512f",)),
    "avx512": (("avx512_bf16", "amx"), ("-mno-avx512bf16",)),
    "avx512_bf16": (("amx",), ()),
}
"""For each value of SLUICE_CPU: CPU features that it forbids, and flags that exclude them."""


@dataclass(frozen=True)
class CppSource:
    """A C++ file to compile, and texts for the error if it cannot be compiled.

    flags: compiler flags in addition to COMPILER_FLAGS.
    headers: Sluice's headers that the file includes.
    field: the setting that requires the library.
    without: a setting that avoids the library, and its effect.
    """

    path: Path
    field: str
    without: str
    flags: tuple[str, ...] = ()
    headers: tuple[Path, ...] = ()


def load_library(source: CppSource) -> ctypes.CDLL:
    """Loads the library, built if missing. Raises UserError if that fails."""
    path = _built(source)
    try:
        handle = os.open(path, os.O_RDONLY)  # never closed, because no later file may get its descriptor number
        _require_own(os.fstat(handle), path, source)
        name = (
            f"/proc/self/fd/{handle}" if sys.platform.startswith("linux") else str(path)
        )  # this name loads exactly the file that was checked
        return ctypes.CDLL(name)
    except OSError as error:
        rule = f"must contain loadable libraries: {path}: {error}"
        raise UserError("SLUICE_CACHE", path.parent, rule, _move(source)) from error


@cache
def cpu_features() -> str:
    """Returns this CPU's features, without those that SLUICE_CPU hides."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform.startswith("linux") else []
    features = [line for line in lines if line.startswith(("flags", "Features"))]
    said, (hidden, _) = features[0] if features else platform.processor(), _limit()
    return " ".join(word for word in said.split() if not word.startswith(hidden)) if hidden else said


def _limit() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the CPU features that SLUICE_CPU hides, and the compiler flags that exclude them."""
    most = os.environ.get("SLUICE_CPU", "")
    if most and most not in CPU_LIMITS:
        raise UserError(
            "SLUICE_CPU", most, f"must be one of {', '.join(CPU_LIMITS)}", "unset it to use all of this CPU"
        )
    return CPU_LIMITS.get(most, ((), ()))


def has_avx2() -> bool:
    """Returns whether this CPU has the features that vectors.h needs."""
    return {"avx2", "fma"} <= set(cpu_features().split())


def compiler_name(source: CppSource) -> str:
    """Returns the first line of the compiler's version output. Raises UserError without a compiler."""
    compiler = _compiler(source)
    return (_version(*compiler).decode(errors="replace").splitlines() or [shlex.join(compiler)])[0]


def _built(source: CppSource) -> Path:
    """Returns the path of the library for this source, compiler and CPU, built if missing."""
    compiler = _compiler(source)
    openmp = ["-fopenmp"] if sys.platform.startswith("linux") else []
    command = [*compiler, *COMPILER_FLAGS, *source.flags, *NATIVE.get(platform.machine(), []), *_limit()[1], *openmp]
    texts = [path.read_bytes() for path in (source.path, *source.headers)]
    parts = [
        " ".join(command).encode(),
        _version(*compiler),
        cpu_features().encode(),
        *texts,
    ]  # machines that share a home directory may have different CPUs
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()
    folder = Path(os.environ.get("SLUICE_CACHE") or Path.home() / ".cache" / "sluice") / "kernels"
    path = folder / f"{source.path.stem}_{key[:16]}.so"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_own(folder.stat(), folder, source)
        if not path.exists():
            with tempfile.TemporaryDirectory(
                dir=folder
            ) as scratch:  # several ranks may build the library at once; the last file replaces the others
                library = _build(source, command, Path(scratch) / path.name)
                library.chmod(library.stat().st_mode & ~0o022)  # removes the write permissions that the umask may allow
                library.replace(path)
    except OSError as error:
        raise UserError("SLUICE_CACHE", folder.parent, f"cannot be written: {error.strerror}", _move(source)) from error
    return path


def _compiler(source: CppSource) -> list[str]:
    """Returns the command of the C++ compiler: CXX, or the first on the PATH."""
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in [asked] if asked else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(command[0]):
            return command
    lack = f"CXX={asked[0]} is not on the PATH" if asked else "this machine has none"
    raise UserError(source.field, True, f"needs a C++ compiler, and {lack}", _cure(source))


@cache
def _version(*compiler: str) -> bytes:
    return subprocess.run([*compiler, "--version"], capture_output=True).stdout


def _build(source: CppSource, command: list[str], library: Path) -> Path:
    """Run the compiler. Returns the path of the library."""
    done = subprocess.run([*command, "-o", str(library), str(source.path)], capture_output=True, text=True)
    got_on()
    if done.returncode:
        said = textwrap.indent(done.stderr.strip()[-1000:], " " * 8)
        rule = f"{command[0]} cannot build {source.path.name}:\n{said}"
        raise UserError(source.field, True, rule, _cure(source))
    return library


def _require_own(found: os.stat_result, path: Path, source: CppSource) -> None:
    """Raise UserError if anyone but this user and root could have written the path."""
    if found.st_uid not in (os.geteuid(), 0):
        problem, cure = f"belongs to user {found.st_uid}", "remove it"
    elif found.st_mode & 0o002:
        problem, cure = "can be written by every user", f"`chmod go-w {path}`, if you trust its content"
    elif found.st_mode & 0o020 and not _is_private(found.st_gid):
        problem, cure = f"can be written by group {found.st_gid}", f"`chmod g-w {path}`, if you trust its content"
    else:
        return
    rule = f"must not be writable by other users, because code is loaded from it: {path} {problem}"
    move = f"{_move(source)} (data.cache may be shared)"
    raise UserError("SLUICE_CACHE", path.parent, rule, f"{cure}, or {move}")


def _is_private(group: int) -> bool:
    """Returns whether the group has only this user and root."""
    try:
        user, entry = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return group == 0
    return group == 0 or (entry.gr_name == user and set(entry.gr_mem) <= {user})


def _cure(source: CppSource) -> str:
    return f"install g++ or clang++ (or name one in CXX), or set {source.without}"


def _move(source: CppSource) -> str:
    return f"set SLUICE_CACHE to a folder of your own on a file system that allows execution, or {source.without}"
