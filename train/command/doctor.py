"""`sluice doctor [KEY=VALUE ...]`: checks this machine for a run of the recipe.

It shows the program, packages, device, compiled code and disks that a run would
use. For everything that is missing it says what to do. The checks call the same
code as a run. They start no process and write no file, with one exception: they
build the compiled code and cache it, as a run does.
"""

import os
import platform
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import psutil
from packaging.requirements import Requirement
from rich.console import Console

from conf.disk import describe_room, size_in_words
from conf.errors import EXIT_OK, EXIT_USER, UserError
from conf.load import compose, reported
from conf.schema import ROOT, Config
from conf.screen import Terminal
from train import __version__
from train.kernels.cpu.processor import cpu_name
from train.kernels.fp8.installed import version
from train.program import COMMAND, DISTRIBUTION
from train.show.screens import GOOD, WARN, show_rows

FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
"""CPU features (Linux names) that speed up compiled code or GEMMs."""


class DoctorLine(NamedTuple):
    """One line of `sluice doctor`. stops: whether this finding prevents every run."""

    label: str
    state: str
    cure: str | None = None
    stops: bool = False


@reported
def main(words: list[str]) -> int:
    """Check this machine and print the result; returns the exit code."""
    return doctor_screen(list(find_all(compose(*words))), Terminal())


def version_line() -> str:
    """Returns the versions of Sluice, torch and DeepSpeed as text."""
    return f"{COMMAND} {__version__}, torch {version('torch')}, deepspeed {version('deepspeed')}"


def doctor_screen(findings: list[DoctorLine], console: Console) -> int:
    """Print all findings. Returns EXIT_USER if a finding prevents every run."""
    bad, lacks = [one for one in findings if one.stops], [one for one in findings if one.cure]
    rows = [
        (one.label, one.state + (f"\n{'error' if one.stops else 'to do'}: {one.cure}" if one.cure else ""))
        for one in findings
    ]
    named = ", ".join(one.label for one in bad or lacks)
    title = f"not ready to train: {named}" if bad else f"ready to train{'; could be improved: ' * bool(lacks)}{named}"
    show_rows(console, title, WARN if lacks else GOOD, rows)
    return EXIT_USER if bad else EXIT_OK


def find_all(config: Config) -> Iterator[DoctorLine]:
    """Yields all findings, in display order."""
    from train.model.count import checkpoint_bytes

    yield DoctorLine("Program", f"{version_line()}, Python {platform.python_version()}, in {ROOT}")
    yield _packages()
    yield from _device(config)
    yield from _cpu()
    yield _disk("Runs", Path(config.runs), "runs=FOLDER", checkpoint_bytes(config) * max(1, config.checkpoint.keep))
    yield _disk("Cache", Path(config.data.cache), "SLUICE_CACHE=FOLDER", 0)


def _packages() -> DoctorLine:
    """Returns whether the installed packages meet the requirements."""
    wanted = [
        one for one in map(Requirement, requirements()) if one.marker is None or one.marker.evaluate({"extra": ""})
    ]
    bad = {
        str(one): f"{one.name} is {version(one.name) or 'not installed'}"
        for one in wanted
        if (found := version(one.name)) is None or not one.specifier.contains(found, prereleases=True)
    }
    if not bad:
        return DoctorLine("Packages", f"all {len(wanted)} have suitable versions")
    return DoctorLine("Packages", "; ".join(bad.values()), f"pip install {shlex.join(bad)}", stops=True)


def requirements() -> list[str]:
    """Returns the required packages: from the installed distribution's metadata, else from pyproject.toml."""
    try:
        return metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def _device(config: Config) -> Iterator[DoctorLine]:
    """Yields lines about the device of a run, and about FP8."""
    import torch

    from train.kernels.device import idle_gpu, sees_gpu
    from train.kernels.fp8.hopper import has_mx_tiles, needs_deep_gemm
    from train.kernels.fp8.installed import look_up_versions, misfits
    from train.kernels.gpu.host_compiler import PYTHON, compiler_command, missing_for_triton

    try:
        usable = config.cluster.device != "cpu" and sees_gpu(config.cluster.device)
    except UserError as error:
        yield DoctorLine("Device", error.rule, error.cure, stops=True)
        return
    if not usable:
        why = idle_gpu(config, torch.device("cpu"))
        yield DoctorLine("Device", f"CPU{f' ({why})' if why else ''}", why and "install a build of torch with CUDA")
        return
    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    names = ", ".join(f"{one.name} with {size_in_words(one.total_memory)}" for one in devices)
    yield DoctorLine("Device", f"{len(devices)} of CUDA {torch.version.cuda}: {names}")
    lacks, cure = missing_for_triton() or (None, None)
    yield DoctorLine(
        "Triton",
        lacks or f"compiles kernel launchers with {compiler_command()} and {PYTHON}'s headers",
        cure,
        bool(lacks),
    )
    found = look_up_versions()
    fp8, wanted = config.precision.fp8, config.precision.fp8 is not None
    bad = misfits(found, fp8 is not None and needs_deep_gemm(fp8), fp8 is not None and has_mx_tiles(fp8))
    problems, cures = "; ".join(problem for problem, _ in bad), "; ".join(dict.fromkeys(cure for _, cure in bad))
    yield DoctorLine(
        "FP8",
        f"not available: {problems}" if bad else str(found),
        cures if bad and wanted else None,
        bool(bad) and wanted,
    )


def _cpu() -> Iterator[DoctorLine]:
    """Yields a line about the CPU, and one about compiled code."""
    from train.kernels.cpu.cpp_build import compiler_name, cpu_features, has_avx2
    from train.kernels.cpu.libraries import LIBRARY_NAMES, library, source

    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory()
    features = ", ".join(name for name in FEATURES if name in cpu_features().split())
    free = f"memory {size_in_words(memory.available)} of {size_in_words(memory.total)} free"
    yield DoctorLine("CPU", f"{cpu_name()}, {cores} cores, {features or 'no supported vector extensions'}; {free}")
    try:
        compiler = compiler_name(
            source(LIBRARY_NAMES[0], "cluster.compiled", "cluster.compiled=false: torch's operations, slower")
        )
        for name in LIBRARY_NAMES if has_avx2() else ():
            library(name)
    except UserError as error:
        yield DoctorLine("Compiled", error.rule, error.cure)
        return
    built = ", ".join(LIBRARY_NAMES) if has_avx2() else "none: this CPU has no AVX2"
    yield DoctorLine("Compiled", f"{built}; by {compiler}")


def _disk(label: str, folder: Path, setting: str, needed: int) -> DoctorLine:
    path = folder.expanduser().absolute()
    place = next(one for one in (path, *path.parents) if one.exists())
    state = f"{folder}: {describe_room(place)}" + (
        f"; checkpoints of this recipe take {size_in_words(needed)}" if needed else ""
    )
    if not os.access(place, os.W_OK | os.X_OK):
        return DoctorLine(
            label, f"{state}; {place} cannot be written", f"set {setting} to a folder of your own", stops=True
        )
    short = shutil.disk_usage(place).free < needed
    return DoctorLine(
        label, state, f"free space on it, or set {setting} to a folder on a larger disk" if short else None, stops=short
    )
