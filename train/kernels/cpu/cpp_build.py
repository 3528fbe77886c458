"""C++ beside the Python, compiled at its first use and kept.

The compiler is the machine's own (CXX, g++ or clang++), so that the loops use the widest vectors that the CPU has.  What is
built lies in $SLUICE_CACHE/kernels under the hash of all that went into it, the CPU's features among them. What somebody
else could have put there is not loaded: whoever can write the folder or a library could run code as this user.
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
"""Integers wrap, as the bits of what is not finite do."""
NATIVE = {"x86_64": ["-march=native", "-mprefer-vector-width=512"], "aarch64": ["-mcpu=native"]}
"""By machine: the widest vectors that the CPU has."""


CPU_LIMITS = {
    "avx2": (("avx512", "amx"), ("-mno-avx512f",)),
    "avx512": (("avx512_bf16", "amx"), ("-mno-avx512bf16",)),
    "avx512_bf16": (("amx",), ()),
}
"""What SLUICE_CPU may say that a CPU has at most: features that are then not seen, and what the compiler is told."""


@dataclass(frozen=True)
class CppSource:
    """One file to compile, and what to say where that cannot be.

    flags: beside COMPILER_FLAGS. headers: what the file includes of ours. field: the setting that asks for it.
    without: what to set to do without it, and what that means.
    """

    path: Path
    field: str
    without: str
    flags: tuple[str, ...] = ()
    headers: tuple[Path, ...] = ()


def load_library(source: CppSource) -> ctypes.CDLL:
    """The library, built if it is not there yet. Raises UserError where nothing can build, keep or load it."""
    path = _built(source)
    try:
        handle = os.open(path, os.O_RDONLY)  # stays open: the loader takes an equal name for the same library
        _require_own(os.fstat(handle), path, source)
        name = f"/proc/self/fd/{handle}" if sys.platform.startswith("linux") else str(path)  # what was looked at
        return ctypes.CDLL(name)
    except OSError as error:
        rule = f"must hold libraries that can be loaded: {path}: {error}"
        raise UserError("SLUICE_CACHE", path.parent, rule, _move(source)) from error


@cache
def cpu_features() -> str:
    """What this CPU can do, as the system says it, without what SLUICE_CPU leaves out."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform.startswith("linux") else []
    features = [line for line in lines if line.startswith(("flags", "Features"))]
    said, (hidden, _) = features[0] if features else platform.processor(), _limit()
    return " ".join(word for word in said.split() if not word.startswith(hidden)) if hidden else said


def _limit() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What SLUICE_CPU hides of this CPU, and the compiler's flags for it."""
    most = os.environ.get("SLUICE_CPU", "")
    if most and most not in CPU_LIMITS:
        raise UserError(
            "SLUICE_CPU", most, f"must be one of {', '.join(CPU_LIMITS)}", "unset it to use all of this CPU"
        )
    return CPU_LIMITS.get(most, ((), ()))


def has_avx2() -> bool:
    """Whether this CPU has the least that vectors.h is made of, as nearly all of x86 have since 2015."""
    return {"avx2", "fma"} <= set(cpu_features().split())


def compiler_name(source: CppSource) -> str:
    """The C++ compiler that would build it, in its own words. Raises UserError where there is none."""
    compiler = _compiler(source)
    return (_version(*compiler).decode(errors="replace").splitlines() or [shlex.join(compiler)])[0]


def _built(source: CppSource) -> Path:
    """The shared library for this source, compiler and CPU."""
    compiler = _compiler(source)
    openmp = ["-fopenmp"] if sys.platform.startswith("linux") else []
    command = [*compiler, *COMPILER_FLAGS, *source.flags, *NATIVE.get(platform.machine(), []), *_limit()[1], *openmp]
    texts = [path.read_bytes() for path in (source.path, *source.headers)]
    parts = [
        " ".join(command).encode(),
        _version(*compiler),
        cpu_features().encode(),
        *texts,
    ]  # machines that share a home differ
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()
    folder = Path(os.environ.get("SLUICE_CACHE") or Path.home() / ".cache" / "sluice") / "kernels"
    path = folder / f"{source.path.stem}_{key[:16]}.so"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_own(folder.stat(), folder, source)
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:  # ranks may build at once; the last one's stays
                library = _build(source, command, Path(scratch) / path.name)
                library.chmod(library.stat().st_mode & ~0o022)  # whatever the umask is
                library.replace(path)
    except OSError as error:
        raise UserError("SLUICE_CACHE", folder.parent, f"cannot be written: {error.strerror}", _move(source)) from error
    return path


def _compiler(source: CppSource) -> list[str]:
    """The command of the C++ compiler: CXX if it is set, else the first at hand."""
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
    """Runs the compiler; returns the library."""
    done = subprocess.run([*command, "-o", str(library), str(source.path)], capture_output=True, text=True)
    got_on()
    if done.returncode:
        said = textwrap.indent(done.stderr.strip()[-1000:], " " * 8)
        rule = f"{command[0]} cannot build {source.path.name}:\n{said}"
        raise UserError(source.field, True, rule, _cure(source))
    return library


def _require_own(found: os.stat_result, path: Path, source: CppSource) -> None:
    """UserError for a folder or file that somebody else than this user and root could have written."""
    if found.st_uid not in (os.geteuid(), 0):
        problem, cure = f"belongs to user {found.st_uid}", "remove it"
    elif found.st_mode & 0o002:
        problem, cure = "can be written by every user", f"`chmod go-w {path}`, if you trust what is there"
    elif found.st_mode & 0o020 and not _is_private(found.st_gid):
        problem, cure = f"can be written by group {found.st_gid}", f"`chmod g-w {path}`, if you trust what is there"
    else:
        return
    rule = f"must hold nothing that others can change, as code is loaded from there: {path} {problem}"
    move = f"{_move(source)} (data.cache may be shared)"
    raise UserError("SLUICE_CACHE", path.parent, rule, f"{cure}, or {move}")


def _is_private(group: int) -> bool:
    """Whether nobody but this user, or root, is in the group: many systems give every user such a group."""
    try:
        user, entry = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return group == 0
    return group == 0 or (entry.gr_name == user and set(entry.gr_mem) <= {user})


def _cure(source: CppSource) -> str:
    return f"install g++ or clang++ (or name one in CXX), or set {source.without}"


def _move(source: CppSource) -> str:
    return f"set SLUICE_CACHE to a folder of yours whose files may run, or {source.without}"
