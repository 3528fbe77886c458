"""Reads and writes starts.json: command, code and machine of each start of a run.

The file is one JSON list with an object for each start:
    time        Unix time of the command, in seconds
    command     the command, quoted for a shell
    folder      working folder of the command
    commit      commit of the program's own repository; null without a repository
    modified    whether files of this commit were changed
    machine     machine of rank 0: host, system, device, cores and memory_bytes; absent until rank 0 has started
    ranks       number of ranks
    versions    versions of Python and of the packages that compute, on rank 0

The driver adds an entry, and rank 0 completes it. This file does not import torch.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from cluster.place import given_place
from conf.errors import UserError
from conf.files import atomic_write_json, read_plain_json
from conf.schema import ROOT
from train import __version__
from train.kernels.fp8.installed import version
from train.program import COMMAND, typed_command

STARTS_FILE = "starts.json"
KEPT = 100
"""Maximum number of starts in starts.json. The newest starts are kept."""
PACKAGES = ("torch", "deepspeed", "numpy", "ray", "triton")
GIT_SECONDS = 10.0
TYPES = {"time": (int, float), "command": str, "folder": str, "commit": (str, type(None)), "modified": bool}
RUNNING = {"machine": dict, "ranks": int, "versions": dict}
MACHINE = {"host": str, "system": str, "device": str, "cores": int, "memory_bytes": int}
StartRecord = dict[str, Any]


def record_start(folder: Path) -> None:
    """Add the current command to starts.json in a run folder."""
    commit, modified = code_version()
    start = {"time": time.time(), "command": typed_words(), "folder": os.getcwd()}
    _write(folder, [*read_starts(folder), start | {"commit": commit, "modified": modified}])


def record_machine(folder: Path, device: str, ranks: int, is_gpu: bool = False) -> None:
    """Add this machine to the newest start. device: GPU or CPU name."""
    if not (starts := read_starts(folder)):
        return  # a user has started this rank by hand
    *before, newest = starts
    machine = {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "device": device,
        "is_gpu": is_gpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
    }
    versions = {COMMAND: __version__, "python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    found = {name: version for name, version in versions.items() if version is not None}
    _write(folder, [*before, newest | {"machine": machine, "ranks": ranks, "versions": found}])


def read_starts(folder: Path) -> list[StartRecord]:
    """Returns all starts, oldest first; empty without a file. Raises UserError for a damaged file."""
    path = folder / STARTS_FILE
    try:
        starts = read_plain_json(path) if path.exists() else []
        if not isinstance(starts, list):
            raise TypeError("it is not a list")
        for start in starts:
            _require(start, TYPES)
            if "machine" in start:
                _require(start, RUNNING)
                _require(start["machine"], MACHINE)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            STARTS_FILE, path, f"is damaged: {error}", "remove it; the next start writes a new file"
        ) from error
    return starts


def ran_on_gpu(folder: Path) -> bool:
    """Whether the newest start with a recorded machine trained on GPUs."""
    machines = [start["machine"] for start in read_starts(folder) if "machine" in start]
    return bool(machines and machines[-1].get("is_gpu"))


def _require(values: dict[str, Any], types: dict[str, Any]) -> None:
    for name, kind in types.items():
        if not isinstance(values[name], kind):
            raise TypeError(f"{name} is {values[name]!r}")


def command_to_go_on(folder: Path) -> str:
    """Returns the run's last command without `resume=`."""
    starts = read_starts(folder)
    if not starts:
        return "the same command"
    return shlex.join(word for word in shlex.split(starts[-1]["command"]) if not word.startswith("resume="))


def typed_words() -> str:
    """Returns the current command, quoted for a shell."""
    if (place := given_place()) is not None:
        nodes = ["--nnodes", str(place.world // place.local_world)] if place.world > place.local_world else []
        start = ["torchrun", *nodes, "--nproc-per-node", str(place.local_world), "-m", "train"]
    else:
        start = typed_command() or [Path(sys.argv[0]).name or "python"]
    return shlex.join([*start, *sys.argv[1:]])


def code_version() -> tuple[str | None, bool]:
    """Returns the commit or None, and whether files were changed."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None, False
    commit = _git("rev-parse", "HEAD")
    return commit, bool(commit and _git("status", "--porcelain", "--untracked-files=no"))


def code_words(start: StartRecord) -> str:
    """Describes the version of the code for the user."""
    if start["commit"] is None:
        return "installed, not a git repository"
    return f"git commit {start['commit']}{', with changed files' if start['modified'] else ''}"


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):  # another user's repository, a damaged repository, a slow disk
        return None
    return done.stdout.strip()


def _write(folder: Path, starts: list[StartRecord]) -> None:
    atomic_write_json(folder / STARTS_FILE, starts[-KEPT:])
