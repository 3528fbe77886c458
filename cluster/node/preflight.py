"""Checks a node before it may run ranks: same program, same recipe, an accurate clock, shared storage, devices.

The same path may lead to different storage, so each node reads a file of the driver, and writes a file for the driver.
"""

import hashlib
import importlib.metadata
import os
import platform
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.clocks import SteadyClock
from cluster.topology import Node
from conf.own_code import is_findable
from conf.schema import ROOT

CLOCK_LIMIT = 2.0
"""Maximum seconds between the clocks of a node and of the driver."""
SCRATCH_LIMIT = 256 << 20
"""Minimum free bytes of a node for output of ranks."""
DRIVER_LEAVES = 0.99
"""Fraction of a GPU's memory that programs can use: on an H100, 81008 of 81559 MiB."""
PROBES = ".preflight"
SOURCE_SUFFIXES = (".py", ".cpp", ".h")
"""Suffixes of source files. Nodes compile the C++ code."""


@dataclass(frozen=True)
class Question:
    folder: str
    """Run folder."""
    word: str
    """Random text that the driver wrote to a file in the run folder. Each node must read the same text there."""
    node: str
    devices: int
    """Number of ranks that the node may hold."""
    on_gpus: bool
    """Whether each rank has a GPU."""
    address: str = ""
    """The node's address."""
    key: bytes = b""
    """Key of the driver's UDP questions (cluster/node/pulse_echo.py), or empty."""
    tests_network: bool = False
    """Whether the network test will need a port on this node."""
    targets: tuple[str, ...] = ()
    """Import paths of the user's own code."""
    typed_in: str = ""
    """The folder in which the user typed the command."""


@dataclass(frozen=True)
class Facts:
    """The facts that a node reports about itself."""

    python: str
    torch: str
    program: str
    """Digest of the source files of the program."""
    recipe: str
    """Digest of the run's config.yaml as the node reads it."""
    clock: float
    gpus: int
    device_bytes: int
    """Memory of the node's smallest GPU in bytes; without GPUs, the node's memory / number of ranks."""
    free_bytes: int
    """Free bytes in the folder for temporary files."""
    storage: str
    """Text about a problem with the run folder, or empty."""
    lacking: tuple[str, ...] = ()
    """Import paths in `Question.targets` that the node cannot find."""
    niceness: int = 0
    """Niceness of the agent and its ranks; higher is lower priority."""
    pulse: tuple[str, int] | None = None
    """Address and port for UDP questions, or None."""
    test_port: int = 0
    """Port for the network test, or 0."""


def gather_facts(question: Question) -> Facts:
    """Gather the facts of this node."""
    storage, recipe = _try_storage(question)
    gpus = _gpu_bytes() if question.on_gpus else []
    return Facts(
        python=platform.python_version(),
        torch=_version("torch"),
        program=_digest_of_program(),
        recipe=recipe,
        clock=time.time(),
        gpus=len(gpus),
        device_bytes=min(gpus, default=psutil.virtual_memory().total // max(1, question.devices)),
        free_bytes=shutil.disk_usage(tempfile.gettempdir()).free,
        storage=storage,
        lacking=tuple(target for target in question.targets if not is_findable(target, question.typed_in)),
        niceness=os.nice(0),
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _digest_of_program() -> str:
    digest = hashlib.sha256()
    for package in ("conf", "train", "parallel", "cluster"):
        for path in sorted((ROOT / package).rglob("*")):
            if path.suffix in SOURCE_SUFFIXES:
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _try_storage(question: Question) -> tuple[str, str]:
    """Return text about a problem with the run folder (or empty), and the digest of the recipe in the folder."""
    folder = Path(question.folder)
    try:
        word = (folder / PROBES / "driver").read_text()
    except OSError as error:
        return f"cannot read {folder}: {error.strerror}", ""
    if word != question.word:
        return f"{folder} has other files than the same folder of the driver", ""
    try:
        (folder / PROBES / question.node).write_text(question.word)
    except OSError as error:
        return f"cannot write to {folder}: {error.strerror}", ""
    return "", hashlib.sha256((folder / "config.yaml").read_bytes()).hexdigest()[:12]


def _gpu_bytes() -> list[int]:
    """Return the usable bytes of every GPU in nvidia-smi's list; 0 if unknown."""
    words = ["nvidia-smi", "--query-gpu=index,memory.total", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    found = re.findall(r"^\d+, (.*)$", result.stdout, re.MULTILINE)
    return [int(DRIVER_LEAVES * int(size)) << 20 if size.isdecimal() else 0 for size in found]  # nvidia-smi prints MiB


class Preflight:
    """Makes the driver's questions to the nodes, and finds problems in their answers."""

    def __init__(self, folder: Path, gpus: bool, clock: SteadyClock, key: bytes = b"", targets: Sequence[str] = ()):
        """Write the file that the nodes must read. key: key of the UDP questions. targets: import paths of user code."""
        self._targets = tuple(targets)
        self._folder, self._gpus, self._clock, self._key = folder, gpus, clock, key
        self._word = secrets.token_hex(8)
        self._sent: dict[str, float] = {}
        (folder / PROBES).mkdir(exist_ok=True)
        (folder / PROBES / "driver").write_text(self._word)
        self._mine = gather_facts(Question(str(folder), self._word, "self", 1, False))

    def question(self, node: Node, tests_network: bool = False) -> Question:
        self._sent[node.id] = self._clock.now()
        words = str(self._folder), self._word, node.id, node.devices, self._gpus, node.address, self._key
        return Question(*words, tests_network, self._targets, os.getcwd())

    def problem(self, node: Node, facts: Facts) -> str | None:
        """Return why this node must not run ranks, with the fix, or None."""
        for what, cure in (
            ("python", "use the same Python on every node"),
            ("torch", "install the same torch on every node"),
            ("program", "install the same version of the program on every node"),
        ):
            theirs, mine = getattr(facts, what), getattr(self._mine, what)
            if theirs != mine:
                return f"{what} is {theirs}, the driver has {mine}; {cure}"
        if facts.storage:
            return f"{facts.storage}; set runs= to a folder that every node mounts"
        if not (self._folder / PROBES / node.id).exists():
            return f"files that it writes to {self._folder} are not visible to the driver; set runs= to a folder that every node mounts"
        if facts.recipe != self._mine.recipe:
            return f"reads another config.yaml ({facts.recipe}, the driver {self._mine.recipe}); set runs= to shared storage"
        if (off := abs(self.ahead(node, facts))) > CLOCK_LIMIT:
            return f"its clock is {off:.1f} s off; start a time service such as chrony"
        if facts.free_bytes < SCRATCH_LIMIT:
            return f"{facts.free_bytes >> 20} MiB free for temporary files, {SCRATCH_LIMIT >> 20} are needed; free some space"
        if facts.lacking:
            return (
                f"there is no {' and no '.join(facts.lacking)} in {os.getcwd()}, in PYTHONPATH or in the node's packages: put that "
                "folder on shared storage, or install the code on every node"
            )
        if self._gpus and facts.gpus < node.devices:
            return f"{facts.gpus} of {node.devices} GPUs answer nvidia-smi; check dmesg for Xid errors"
        return None

    def ahead(self, node: Node, facts: Facts) -> float:
        """Return the seconds by which the node's clock is ahead of the driver's; 0 if the time between question and
        answer could explain the difference.
        """
        return max(0.0, facts.clock - self._clock.now()) - max(0.0, self._sent[node.id] - facts.clock)

    def close(self) -> None:
        """Remove the files that the checks wrote."""
        # A node may still write a file there, which is harmless.
        shutil.rmtree(self._folder / PROBES, ignore_errors=True)
