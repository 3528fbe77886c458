"""`sluice doctor [--constraints] [OVERRIDES]`: what of this machine a run of the recipe would use, and what to do where something lacks.

Each finding asks the code that a run asks. Nothing is started or written, but for compiled code, which is built and kept
as a run would.
"""

import importlib.util
import os
import platform
import shutil
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console

from cluster.spawn import processes_named
from conf.disk import describe_room, size_in_words
from conf.errors import EXIT_OK, EXIT_USER, UserError
from conf.load import compose, reported
from conf.schema import ROOT, Config
from conf.screen import Terminal
from conf.words import say
from train import __version__
from train.kernels.cpu.processor import cpu_name
from train.kernels.fp8.installed import version
from train.metrics.screens import GOOD, WARN, show_rows
from train.program import COMMAND, DISTRIBUTION, install_words

FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
"""Features of CPUs, as Linux calls them, that the compiled code or torch's products gain by."""
EXTRAS = {"datasets": "datasets", "eval": "lm_eval"}
"""Extras of the distribution that any machine can have, and the module that tells whether one is there."""


@dataclass(frozen=True)
class DoctorLine:
    """One line of the screen. cure: what to do, None where nothing lacks. stops: whether runs cannot start like this."""

    label: str
    state: str
    cure: str | None = None
    stops: bool = False


@reported
def main(words: list[str]) -> int:
    """What follows `doctor`: `--constraints`, or overrides of a recipe; returns the exit code."""
    if words == ["--constraints"]:
        say("\n".join(constraints()))
        return EXIT_OK
    config = compose(*words)
    console = Terminal()
    with console.status("looking at this machine"):
        findings = list(find_all(config))
    return doctor_screen(findings, console)


def version_line() -> str:
    """Versions of the program and of the two libraries that decide most."""
    return f"{COMMAND} {__version__}, torch {version('torch')}, deepspeed {version('deepspeed')}"


def doctor_screen(findings: list[DoctorLine], console: Console) -> int:
    """Print all; EXIT_USER where something stops runs."""
    bad, lacks = [one for one in findings if one.stops], [one for one in findings if one.cure]
    rows = [
        (one.label, one.state + (f"\n{'error' if one.stops else 'to do'}: {one.cure}" if one.cure else ""))
        for one in findings
    ]
    title = "ready to train" if not bad else f"not ready to train: {', '.join(one.label for one in bad)}"
    if lacks and not bad:
        title += f"; could be better: {', '.join(one.label for one in lacks)}"
    show_rows(console, title, WARN if lacks else GOOD, rows)
    return EXIT_USER if bad else EXIT_OK


def find_all(config: Config) -> Iterator[DoctorLine]:
    """All findings, in the order in which one reads them."""
    yield _program()
    yield _packages()
    yield from _device(config)
    yield from _cpu(config)
    yield _wandb(config)
    yield _ray()
    yield _disk("Runs", Path(config.runs), "runs=FOLDER", _checkpoint_bytes(config))
    yield _disk("Cache", Path(config.data.cache), "SLUICE_CACHE=FOLDER", 0)
    yield _extras()
    yield _folder(Path.cwd())


def _program() -> DoctorLine:
    return DoctorLine("Program", f"{version_line()}, Python {platform.python_version()}, in {ROOT}")


def _packages() -> DoctorLine:
    """Whether what is installed is what the program asks for."""
    wanted = [
        one for one in map(Requirement, requirements()) if one.marker is None or one.marker.evaluate({"extra": ""})
    ]
    bad = []
    for one in wanted:
        found = version(one.name)
        if found is None or not one.specifier.contains(found, prereleases=True):
            bad.append((str(one), f"{one.name} is {found or 'not installed'}"))
    if not bad:
        return DoctorLine("Packages", f"all {len(wanted)} fit")
    cure = "pip install " + " ".join(f"'{requirement}'" for requirement, _ in bad)
    return DoctorLine("Packages", "; ".join(words for _, words in bad), cure, stops=True)


def constraints() -> list[str]:
    """Lines of a constraints file of pip: what the program asks for, and what that asks for in turn, in the versions that are installed
    here. A build of torch for one kind of device (2.13.0+cpu) is pinned without that kind, which an index of packages chooses.
    """
    extras_of: dict[str, set[str]] = {}
    wanted = [Requirement(one) for one in requirements()]
    for one in wanted:
        one.marker = None  # of every extra
    pins: dict[str, str] = {}
    while wanted:
        one = wanted.pop()
        name, extras = canonicalize_name(one.name), {"", *one.extras}
        if extras <= extras_of.get(name, set()):
            continue
        try:
            there = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # only pip's other platforms and extras have it
        pins[name] = there.version.partition("+")[0]
        extras_of[name] = extras | extras_of.get(name, set())
        asked = map(Requirement, there.requires or [])
        wanted += [one for one in asked if one.marker is None or any(one.marker.evaluate({"extra": e}) for e in extras)]
    head = f"# {COMMAND} doctor --constraints, of {__version__} on Python {platform.python_version()}, {platform.machine()}"
    return [head, *(f"{name}=={version}" for name, version in sorted(pins.items()))]


def requirements() -> list[str]:
    """What the distribution asks for; of a checkout that is not installed, what its pyproject.toml says."""
    try:
        return metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def _device(config: Config) -> Iterator[DoctorLine]:
    """The device that a run would take, and FP8 where the recipe wants it."""
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
        "Triton", lacks or f"starts kernels by {compiler_command()} and {PYTHON}'s headers", cure, bool(lacks)
    )
    found = look_up_versions()
    fp8, wanted = config.precision.fp8, config.precision.fp8 is not None
    bad = misfits(found, fp8 is not None and needs_deep_gemm(fp8), fp8 is not None and has_mx_tiles(fp8))
    problems, cures = "; ".join(problem for problem, _ in bad), "; ".join(dict.fromkeys(cure for _, cure in bad))
    yield DoctorLine(
        "FP8", f"not here: {problems}" if bad else str(found), cures if bad and wanted else None, bool(bad) and wanted
    )


def _cpu(config: Config) -> Iterator[DoctorLine]:
    """The processor, the compiler, and whether the compiled parts of a step can be had."""
    from train.kernels.cpu.cpp_build import compiler_name, cpu_features, has_avx2
    from train.kernels.cpu.libraries import LIBRARY_NAMES, library, source

    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory()
    features = [name for name in FEATURES if name in cpu_features().split()]
    yield DoctorLine(
        "CPU",
        f"{cpu_name()}, {cores} cores, {', '.join(features) or 'no features that help'}; "
        f"memory {size_in_words(memory.available)} of {size_in_words(memory.total)} free",
    )
    example = source(LIBRARY_NAMES[0], "cluster.compiled", "cluster.compiled=false: torch's operations, slower")
    try:
        compiler = compiler_name(example)
    except UserError as error:
        yield DoctorLine("Compiler", error.rule, error.cure)
        return
    yield DoctorLine("Compiler", compiler)
    if not has_avx2():
        yield DoctorLine("Compiled", "nothing: this CPU has no AVX2, so a step on it is made of torch's operations")
        return
    try:
        for name in LIBRARY_NAMES:
            library(name)
    except UserError as error:
        yield DoctorLine("Compiled", error.rule, error.cure)
        return
    yield DoctorLine("Compiled", f"{', '.join(LIBRARY_NAMES)}: built, kept and loaded")


def _wandb(config: Config) -> DoctorLine:
    from train.metrics.wandb_sink import goes_online, wants_wandb

    if not wants_wandb(config.log.wandb):
        return DoctorLine("W&B", "disabled")
    import wandb

    found = f"wandb {wandb.__version__}"
    if goes_online(config.log.wandb, wandb):
        return DoctorLine("W&B", f"{found}, online at {wandb.setup().settings.base_url}")
    return DoctorLine(
        "W&B", f"{found}, offline: runs stay in runs/NAME/wandb; `wandb login` makes the next ones go online"
    )


def _ray() -> DoctorLine:
    """Ray is looked at from outside: connecting to it would start things."""
    flag = "--gcs_server_port="
    heads = [
        next((word.removeprefix(flag) for word in line if word.startswith(flag)), "?")
        for _, line in processes_named("gcs_server")
    ]
    state = (
        f"a head listens at port {', '.join(heads)}" if heads else "none runs here; cluster=ray starts one for a run"
    )
    return DoctorLine("Ray", f"ray {version('ray')}, {state}")


def _checkpoint_bytes(config: Config) -> int:
    """Bytes of all checkpoints that a run keeps, as a run counts them before it starts."""
    from train.model.count import checkpoint_bytes

    return checkpoint_bytes(config) * max(1, config.checkpoint.keep)


def _disk(label: str, folder: Path, setting: str, needed: int) -> DoctorLine:
    place = folder.expanduser().absolute()
    while not place.exists():
        place = place.parent
    state = f"{folder}: {describe_room(place)}" + (
        f"; checkpoints of this recipe take {size_in_words(needed)}" if needed else ""
    )
    if not os.access(place, os.W_OK | os.X_OK):
        return DoctorLine(
            label, f"{state}; {place} cannot be written", f"set {setting} to a folder of yours", stops=True
        )
    short = shutil.disk_usage(place).free < needed
    return DoctorLine(
        label, state, f"free space there, or set {setting} on a larger disk" if short else None, stops=short
    )


def _extras() -> DoctorLine:
    has = {extra: importlib.util.find_spec(module) is not None for extra, module in EXTRAS.items()}
    words = ", ".join(f"{extra} {'installed' if there else 'not installed'}" for extra, there in has.items())
    absent = ",".join(extra for extra, there in has.items() if not there)
    return DoctorLine("Extras", words + (f" ({install_words(absent)})" if absent else ""))


def _folder(here: Path) -> DoctorLine:
    """Files of the working folder that `python -m train` would run instead of the program."""
    if here == ROOT:
        return DoctorLine("Folder", f"{here}: the program's own")
    found = _hiding(here, ("train.py", "train/__init__.py"))
    state = (
        f"{here}: `python -m train` runs {', '.join(found)} there, not this program"
        if found
        else f"{here}: hides nothing"
    )
    return DoctorLine("Folder", state, f"type `{COMMAND}`, which does not look there" if found else None)


def _hiding(here: Path, names: Iterable[str]) -> list[str]:
    return [name for name in names if (here / name).is_file()]
