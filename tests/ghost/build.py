"""Compiles the ghost for the torch of this Python, and the environment that puts a process on it."""

import hashlib
import importlib.util
import os
import subprocess
import tempfile
from pathlib import Path

SOURCES = [Path(__file__).with_name(name) for name in ("ghost.h", "runtime.c", "driver.c", "libraries.c")]
LIBRARY = "libcuda.so.1"
"""The driver's own name: whoever opens it later gets the library that is preloaded."""


class NoCudaBuild(Exception):
    """This Python has no CUDA build of torch, or no compiler is there; the text says what to install."""


def ghost_environment() -> dict[str, str]:
    """This process's environment with the ghost, which is compiled where it has changed. Raises NoCudaBuild."""
    folder = build()
    library = str(folder / LIBRARY)
    before = os.environ.get("LD_PRELOAD", "")
    preload = library if not before else f"{library}:{before}"
    # The driver's functions for growing segments are not all there.
    settings = {"CUDA_VISIBLE_DEVICES": "0", "PYTORCH_ALLOC_CONF": "expandable_segments:False"}
    return os.environ | settings | {"LD_PRELOAD": preload, "TRITON_LIBCUDA_PATH": str(folder)}


def build() -> Path:
    """The folder of the compiled library."""
    includes = headers()
    key = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES) + str(includes).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"sluice-ghost-{os.getuid()}" / key
    if not (folder / LIBRARY).exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = folder / f"{LIBRARY}.{os.getpid()}"  # complete when it takes its name
        command = ["cc", "-O1", "-Wall", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}"]
        command += [f"-I{include}" for include in includes] + list(map(str, SOURCES[1:])) + ["-o", str(made)]
        try:
            subprocess.run([*command, "-ldl", "-lpthread"], check=True)
        except FileNotFoundError as error:
            raise NoCudaBuild("there is no C compiler: apt-get install gcc libc6-dev") from error
        made.rename(folder / LIBRARY)
    return folder


def headers() -> list[Path]:
    """Folders of CUDA's headers; the CUDA build of torch and its triton bring them."""
    wanted = {"nvidia.cu13": "include", "triton": "backends/nvidia/include"}
    found = []
    for package, folder in wanted.items():
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            spec = None
        paths = [Path(place) / folder for place in (spec.submodule_search_locations if spec else ())]
        found += [path for path in paths if path.is_dir()][:1]
    if len(found) < len(wanted):
        raise NoCudaBuild("this Python's torch is no CUDA 13 build: pip install torch==2.13.0 from PyPI brings one")
    return found
