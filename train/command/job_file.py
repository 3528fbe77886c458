"""`sluice launch --print KIND hardware=NAME [KEY=VALUE ...]`: prints a job file.

KIND: slurm, kuberay, skypilot or torchrun. More flags: --queue=NAME,
--image=IMAGE. The file starts the recipe on a cluster of this kind. The command
prints the file on standard output, with a reason beside every value. It starts
no job and sends nothing. Nodes, devices, memory and the time limit follow from
the recipe and its plan (mode=plan).
"""

import math
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import jinja2

from conf.errors import EXIT_OK, UserError
from conf.load import compose, reported
from conf.schema import ROOT, Config, Mode
from conf.words import say
from train import __version__
from train.model.count import checkpoint_bytes
from train.program import DISTRIBUTION

PROCESS_BYTES = 12e9
"""Estimated host memory of a rank, without checkpoint buffers."""
CORES_PER_DEVICE = 8
"""Estimated cores per rank, including threads for data and checkpoints."""
SAVES = 2
"""Maximum number of checkpoint buffers in use at a time."""
LONGEST = 24
"""Maximum hours of a job. Longer runs continue in a new job."""
SPARE_TIME = 1.25
"""Factor on the planned time, for starts, checkpoints and validations."""
FILE_KINDS = ("slurm", "kuberay", "skypilot", "torchrun")
"""Kinds of job files. Each kind has a template."""
ON_RAY = ("slurm", "kuberay")
"""Kinds of job files that start Ray."""
LAUNCH_FLAGS = ("--print", "--queue", "--image")


@dataclass(frozen=True)
class Job:
    """The values for the template of any kind of job file."""

    config: Config
    words: list[str]
    """The recipe's arguments from the command line."""
    nodes: int
    devices: int
    """Number of devices per node."""
    gpu: str | None
    """Name of the GPUs; None for CPUs."""
    memory_bytes: float
    """Host memory that a node needs."""
    hours: int
    plan_line: str
    queue: str | None
    image: str | None
    cores_per_device: int = CORES_PER_DEVICE

    @property
    def memory_gib(self) -> int:
        return math.ceil(self.memory_bytes / 2**30)

    @property
    def cores(self) -> int:
        """Host cores that a node needs."""
        return self.devices * self.cores_per_device

    def plain_name(self, characters: str) -> str:
        """The run's name, with a hyphen for every character outside `characters`."""
        name = self.config.name if "A" in characters else self.config.name.lower()
        return re.sub(f"[^{characters}]+", "-", name).strip("-")

    @property
    def size_reason(self) -> str:
        parallel, shared = self.config.parallel, " x parallel.cp" * (self.config.parallel.cp > 1)
        devices = "GPUs" if self.gpu else "processes"
        return (
            f"parallel.pp x parallel.dp{shared} = {parallel.world} ranks on nodes of {self.devices} {devices} "
            f"(hardware={self.config.hardware.name})"
        )

    @property
    def memory_reason(self) -> str:
        return (
            f"of each node: {self.devices} ranks with {PROCESS_BYTES / 1e9:.0f} GB (an estimate) and {SAVES} parts of a checkpoint "
            f"each, and offloaded tensors"
        )

    @property
    def mounts(self) -> dict[str, str]:
        """Maps each top-level folder that nodes must read to its configuration keys."""
        config, found = self.config, {}
        named = {"runs": config.runs, "data.path": config.data.path, "data.tokenizer": config.data.tokenizer,
                 "init_from": config.init_from, "data.cache": config.data.cache}  # fmt: skip
        named |= {f"data.mix[{place}].path": source.path for place, source in enumerate(config.data.mix)}
        for key, path in named.items():
            if path and path.startswith("/"):
                root = "/" + path.split("/")[1]
                found[root] = f"{found[root]}, {key}" if root in found else key
        return found


@reported
def main(words: Sequence[str], plan: Callable[[Config], tuple[str, float, float]]) -> int:
    """Print the job file; returns the exit code. plan: returns a summary line, hours, and host bytes on a node."""
    kind, options, recipe = _split(words)
    say(_written(kind, _job(kind, recipe, options, plan)).rstrip())
    say(f"how to start it: cluster/docs/launch.md#{kind}", file=sys.stderr)
    return EXIT_OK


def _split(words: Sequence[str]) -> tuple[str, dict[str, str], list[str]]:
    """Splits the arguments into kind of job file, flags, and arguments for the recipe."""
    rest, options = list(words), {}
    for flag in LAUNCH_FLAGS:
        for place, word in enumerate(rest):
            if word == flag and place + 1 < len(rest):
                rest[place : place + 2] = [f"{flag}={rest[place + 1]}"]
                break
    for word in [word for word in rest if word.startswith("-")]:
        flag, _, value = word.partition("=")
        if flag not in LAUNCH_FLAGS or not value:
            raise UserError(
                "sluice launch", word, "is not a flag with a value", f"flags with values: {', '.join(LAUNCH_FLAGS)}"
            )
        options[flag] = value
        rest.remove(word)
    kind = options.pop("--print", "")
    if kind not in FILE_KINDS:
        raise UserError("--print", kind, "must be a kind of job file", f"take {', '.join(FILE_KINDS)}")
    return kind, options, rest


def _job(
    kind: str, recipe: list[str], options: dict[str, str], plan: Callable[[Config], tuple[str, float, float]]
) -> Job:
    if kind in ON_RAY:
        recipe = [word for word in recipe if not word.startswith(("cluster=", "cluster.address="))]
    config = compose(*recipe, *["cluster=ray"] * (kind in ON_RAY))
    if config.mode is not Mode.train:
        raise UserError("mode", config.mode.value, "a job file starts a training", "omit mode=")
    hardware = config.hardware
    if hardware.name is None:
        raise UserError(
            "hardware",
            "none",
            "the job file needs the kind of device",
            "choose hardware=h100, h800, h200, b200 or cpu",
        )
    world, gpu = config.parallel.world, None if hardware.device == "cpu" else hardware.device
    devices = min(world, config.cluster.ranks_per_node or hardware.devices_per_node)
    if world % devices:
        rule = f"{world} ranks do not fill nodes of {devices} devices"
        cure = f"choose parallel.pp and parallel.dp so that their product is a multiple of {devices}, or set cluster.ranks_per_node"
        raise UserError("parallel", world, rule, cure)
    if kind in ("kuberay", "skypilot") and not Path(config.runs).is_absolute():
        rule = "would be on a disk that is deleted with the job"
        raise UserError("runs", config.runs, rule, "set runs=/shared/runs, and mount /shared")
    if kind in ("kuberay", "skypilot") and not any(word.startswith("data.cache=") for word in recipe):
        config.data.cache = str(Path(config.runs).parent / "cache")  # a pod's home folder is not shared
        recipe = [*recipe, f"data.cache={config.data.cache}"]
    line, hours, planned = plan(config)
    buffers = SAVES - (gpu is not None)  # the planned host bytes of a GPU job include one buffer
    memory = devices * (PROCESS_BYTES + buffers * checkpoint_bytes(config) / world) + planned
    limit = min(LONGEST, math.ceil(SPARE_TIME * hours + 0.5))
    found = options.get("--queue"), options.get("--image")
    return Job(config, recipe, world // devices, devices, gpu, memory, limit, line, *found)


def _written(kind: str, job: Job) -> str:
    """Returns the template of this kind of job file, filled with the job's values."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "cluster" / "files"), undefined=jinja2.StrictUndefined,
        block_start_string="#%", block_end_string="%#",
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["join_words"] = shlex.join
    program = f"{DISTRIBUTION}=={__version__}"
    return environment.get_template(f"{kind}.jinja").render(job=job, ray=metadata.version("ray"), distribution=program)
