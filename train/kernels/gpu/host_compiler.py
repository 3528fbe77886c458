"""Checks the tools on the host that Triton needs besides a GPU: a C compiler and Python's headers.

Triton builds small Python modules in C to launch its kernels. So every run on a GPU needs these tools; a C++ compiler
is not enough. This file searches like triton.runtime.build of Triton 3.6 to 3.9, and tests the compiler, which may lack
the C library's headers.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from conf.errors import UserError

COMPILERS = ("gcc", "clang")
"""Compilers that Triton searches for on the PATH if CC is not set."""
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
TRIED_SOURCE = """#include <stdlib.h>
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "tried", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_tried(void) { return PyModule_Create(&module); }
"""
COMPILER_SECONDS = 60.0
"""Time limit in seconds for a compilation, usually under one."""
COMPILER_TAIL = 600
"""Number of characters from the end of the compiler's output that an error message shows."""
INSTALL_COMPILER = "apt-get install build-essential (dnf install gcc), or set CC to a C compiler"
INSTALL_HEADERS = f"apt-get install {PYTHON}-dev, or python3-dev for the system's own Python ({PYTHON}-devel or python3-devel with dnf)"


def missing_for_triton() -> tuple[str, str] | None:
    """Returns a missing tool, and how to install it; or None."""
    compiler = compiler_command()
    if compiler is None:
        return "there is no C compiler: CC is not set, and gcc and clang are not on the PATH", INSTALL_COMPILER
    if shutil.which(compiler) is None:
        return (
            f"CC={compiler} is not a program, and Triton needs the name of a program without arguments in CC",
            INSTALL_COMPILER,
        )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "tried.c"
        source.write_text(TRIED_SOURCE)
        command = [compiler, str(source), "-O3", "-shared", "-fPIC", "-o", f"{folder}/tried.so", f"-I{headers()}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILER_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{compiler} cannot be run: {error}", INSTALL_COMPILER
    if done.returncode == 0:
        return None
    if "Python.h" in done.stderr:
        return f"{PYTHON} has no headers: there is no Python.h in {headers()}", INSTALL_HEADERS
    return f"{compiler} cannot build a module of Python: {done.stderr.strip()[-COMPILER_TAIL:]}", INSTALL_COMPILER


def require_for_triton(device: object) -> None:
    """Raises UserError if `missing_for_triton` finds a problem. device: cluster.device."""
    if (missing := missing_for_triton()) is not None:
        rule = f"needs a C compiler and Python's headers, with which Triton compiles its kernel launchers: {missing[0]}"
        raise UserError("cluster.device", device, rule, f"{missing[1]}; or use cluster.device=cpu")


def compiler_command() -> str | None:
    """Returns the C compiler that Triton would run, or None."""
    given = os.environ.get("CC")
    return next((found for name in COMPILERS if (found := shutil.which(name))), None) if given is None else given


def headers() -> str:
    """Returns the folder in which Triton looks for Python.h."""
    scheme = sysconfig.get_default_scheme()  # Debian's default scheme has a folder without headers
    return sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)["include"]
