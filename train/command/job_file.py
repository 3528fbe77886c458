"""`sluice launch --print KIND [--queue=NAME] [--image=IMAGE] hardware=NAME conf=... key=value`: the file that starts this recipe there.

KIND: slurm, kuberay, skypilot or torchrun. Nothing is started or sent; the file goes to standard output, with the reason for every value
beside it. Nodes, devices, memory and the time limit follow from the recipe and its plan (mode=plan).
"""

import math
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from conf.errors import EXIT_OK, UserError
from conf.load import compose, reported
from conf.schema import ROOT, Config, Mode
from conf.words import say
from train import __version__
from train.model.count import checkpoint_bytes
from train.program import DISTRIBUTION

TEMPLATES = ROOT / "cluster" / "files"
PROCESS_BYTES = 12e9
"""Memory of the host for a rank without its checkpoint: the libraries of CUDA and torch, tokens, pinned buffers. An estimate."""
CORES_PER_DEVICE = 8
"""Cores that a rank and its threads for data and checkpoints find enough; an estimate."""
SAVES = 2
"""Buffers that a checkpoint may take at once: one being written when the next begins."""
LONGEST = 24.0
"""Hours that a job asks for, at most: it saves before its end, is queued again and goes on."""
SPARE_TIME = 1.25
"""Over the planned time of all steps, for starts, checkpoints and validations."""
KUEUE = "kueue.x-k8s.io/queue-name"
ON_RAY = ("slurm", "kuberay")
"""Kinds whose file starts Ray and brings the words for it."""
LAUNCH_FLAGS = ("--print", "--queue", "--image")


@dataclass(frozen=True)
class Job:
    """What every kind of file is filled with."""

    config: Config
    words: list[str]
    """What was typed of the recipe."""
    nodes: int
    devices: int
    """Devices of each node."""
    gpu: str | None
    """Name of the devices; None for processors."""
    memory_bytes: float
    """What a node needs of its host."""
    hours: float
    plan_line: str
    queue: str | None
    image: str | None

    @property
    def memory_gib(self) -> int:
        return math.ceil(self.memory_bytes / 2**30)

    @property
    def arguments(self) -> str:
        return shlex.join(self.words)

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
            f"each, and what is offloaded"
        )

    @property
    def mounts(self) -> dict[str, str]:
        """Absolute folders that every node must see, and the keys that name them."""
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
    """What follows `launch`; returns the exit code. plan: the verdict in words, hours, and bytes that a node offloads."""
    kind, options, recipe = _split(words)
    say(FILE_KINDS[kind](_job(kind, recipe, options, plan)).rstrip())
    say(f"how to start it: cluster/docs/launch.md#{kind}", file=sys.stderr)
    return EXIT_OK


def _split(words: Sequence[str]) -> tuple[str, dict[str, str], list[str]]:
    """The kind, the flags with a value, and the words of the recipe."""
    rest, options = list(words), {}
    for flag in LAUNCH_FLAGS:
        for place, word in enumerate(rest):
            if word == flag and place + 1 < len(rest):
                rest[place : place + 2] = [f"{flag}={rest[place + 1]}"]
                break
    for word in [word for word in rest if word.startswith("-")]:
        flag, _, value = word.partition("=")
        if flag not in LAUNCH_FLAGS or not value:
            raise UserError("sluice launch", word, "is no flag of it with a value", f"it has {', '.join(LAUNCH_FLAGS)}")
        options[flag] = value
        rest.remove(word)
    kind = options.pop("--print", "")
    if kind not in FILE_KINDS:
        raise UserError("--print", kind, "must name a kind of file", f"take {', '.join(FILE_KINDS)}")
    return kind, options, rest


def _job(
    kind: str, recipe: list[str], options: dict[str, str], plan: Callable[[Config], tuple[str, float, float]]
) -> Job:
    if kind in ON_RAY:
        recipe = [word for word in recipe if not word.startswith(("cluster=", "cluster.address="))]
    config = compose(*recipe, *["cluster=ray"] * (kind in ON_RAY))
    if config.mode is not Mode.train:
        raise UserError("mode", config.mode.value, "the file starts a training", "leave mode= out")
    hardware = config.hardware
    if hardware.name is None:
        raise UserError(
            "hardware",
            "none",
            "the file must say which devices a node has",
            "choose hardware=h100, h800, h200, b200 or cpu",
        )
    world, gpu = config.parallel.world, None if hardware.device == "cpu" else hardware.device
    devices = min(world, config.cluster.ranks_per_node or hardware.devices_per_node)
    if world % devices:
        rule = f"{world} ranks do not fill nodes of {devices} devices"
        cure = f"choose parallel.pp and parallel.dp so that their product is a multiple of {devices}, or set cluster.ranks_per_node"
        raise UserError("parallel", world, rule, cure)
    if kind in ("kuberay", "skypilot") and not Path(config.runs).is_absolute():
        rule = "would lie on a disk that goes with the job"
        raise UserError("runs", config.runs, rule, "set runs=/shared/runs, and mount /shared")
    line, hours, offloaded = plan(config)
    share = SAVES * checkpoint_bytes(config) / world
    memory = devices * (PROCESS_BYTES + share) + offloaded
    limit = min(LONGEST, math.ceil(SPARE_TIME * hours + 0.5))
    found = options.get("--queue"), options.get("--image")
    return Job(config, recipe, world // devices, devices, gpu, memory, limit, line, *found)


def _filled(text: str, changes: Sequence[tuple[str, str]]) -> str:
    """A file of cluster/files with other values, each of which has its place there."""
    for pattern, value in changes:
        text, count = re.subn(pattern, lambda _, value=value: value, text, flags=re.MULTILINE | re.DOTALL)
        assert count, f"the file has no {pattern}"
    return text


def _slurm(job: Job) -> str:
    gpus = [(f"--gpus-per-node={job.devices}", "one for each rank of a node")] if job.gpu else []
    header = [
        (f"--nodes={job.nodes}", job.size_reason),
        *gpus,
        ("--mem=0", f"all of a node that the job has alone; it needs {job.memory_gib} GiB {job.memory_reason}"),
        (f"--time={job.hours:.0f}:00:00", f"{job.plan_line}; a job that ends sooner is queued again and goes on"),
        *([(f"--partition={job.queue}", "the partition that --queue named")] if job.queue else []),
    ]
    lines = "".join(f"# {reason}\n#SBATCH {option}\n" for option, reason in header)
    mounts = "".join(f"# {root} must be the same on every node: {keys}\n" for root, keys in job.mounts.items())
    words = f'{mounts}# The recipe; what follows the name of this file on the command line of sbatch goes over it.\nset -- {job.arguments} "$@"\n'
    text = (TEMPLATES / "sluice.sbatch").read_text()
    usage = "# A run on Slurm: Ray on every node of the job, the run's driver on the first. Start it with: sbatch FILE"
    return _filled(
        text,
        [
            (r"^# A run on Slurm:.*?runs=/shared/runs$", usage),
            (r"^#SBATCH --job-name=sluice$", f"#SBATCH --job-name={job.config.name}"),
            (
                r"^#SBATCH --signal=B:TERM@300$",
                f"# A checkpoint before the time limit\n#SBATCH --signal=B:TERM@300\n{lines.rstrip()}",
            ),
            (r"^set -uo pipefail$", f"set -uo pipefail\n\n{words.rstrip()}"),
        ],
    )


def _kuberay(job: Job) -> str:
    name = re.sub(r"[^a-z0-9-]+", "-", job.config.name.lower()).strip("-")
    entry = shlex.join(["python", "-m", "train", *job.words, "cluster=ray", "cluster.address=auto"])
    cores, memory = job.devices * CORES_PER_DEVICE, f"{job.memory_gib}Gi"
    asked = f'cpu: "{cores}", memory: {memory}' + (f', nvidia.com/gpu: "{job.devices}"' if job.gpu else "")
    several = len(job.mounts) > 1
    mounts = "".join(
        f"{' ' * 16}- {{ name: shared, mountPath: {root}{f', subPath: {root[1:]}' if several else ''} }} # {keys}\n"
        for root, keys in job.mounts.items()
    )
    labels = f"\n  labels:\n    {KUEUE}: {job.queue} # Kueue admits the job whole, or lets it wait" if job.queue else ""
    kind = f'num-gpus: "{job.devices}"' if job.gpu else f'num-cpus: "{cores}"'
    image, size = f"image: {job.image or 'IMAGE'}", f"replicas: {job.nodes}"
    changes = [
        (r"^# A run on Kubernetes.*?rayjob\.yaml$", "# A run on Kubernetes with KubeRay 1.5.1 or newer. Start it with: kubectl create -f FILE"),
        (r"^  generateName: sluice-$", f"  generateName: {name}-{labels}"),
        (r"^  entrypoint: >-.*?runs=/shared/runs$", f"  entrypoint: >-\n    {entry}"),
        (r'rayVersion: "[^"]*"', f'rayVersion: "{metadata.version("ray")}" # of this machine; the image must have the same'),
        (r"image: \S+ # <-- an image[^\n]*", f"{image} # with this program and ray[default], the same in every pod"),
        (r"image: \S+ # <-- the same", image),
        (r"^ +- \{ name: shared, mountPath: /shared \}\n", mounts),
        (r"claimName: sluice # <--", "claimName: sluice # yours:"),
        (r"replicas: 4 # <--[^\n]*", f"{size} # {job.size_reason}"),
        (r"minReplicas: 4(\s+)maxReplicas: 4", f"minReplicas: {job.nodes}\n        maxReplicas: {job.nodes}"),
        (r'num-gpus: "8"', kind),
        (r"resources: # <-- a whole node", f"resources: # memory {job.memory_reason}; cores are an estimate of {CORES_PER_DEVICE} a rank"),
        (r'cpu: "96", memory: 1500Gi, nvidia\.com/gpu: "8"', asked),
    ]  # fmt: skip
    return _filled((TEMPLATES / "rayjob.yaml").read_text(), changes) + f"# {job.plan_line}\n"


def _torchrun(job: Job) -> str:
    return f"""#!/bin/bash
# One torchrun on each of {job.nodes} nodes, without a supervisor: where a rank dies the run ends, and the same command goes on.
# {job.plan_line}
# Memory {job.memory_reason}: {job.memory_gib} GiB.
{"".join(f"# {root} must be the same on every node: {keys}{chr(10)}" for root, keys in job.mounts.items())}\
: "${{HEAD:?set HEAD to the name of the first node, the same on every node}}"
# {job.size_reason}; the port must be free on HEAD
exec torchrun --nnodes={job.nodes} --nproc-per-node={job.devices} --rdzv-id={shlex.quote(job.config.name)} --rdzv-backend=c10d \\
  --rdzv-endpoint="$HEAD:29500" -m train {job.arguments} "$@"
"""


def _skypilot(job: Job) -> str:
    name = re.sub(r"[^a-zA-Z0-9-]+", "-", job.config.name).strip("-")
    device = (
        f"accelerators: {job.gpu}:{job.devices} # one for each rank of a node\n  "
        if job.gpu
        else f"cpus: {job.devices * CORES_PER_DEVICE}+ # an estimate of {CORES_PER_DEVICE} a rank\n  "
    )
    image = f"image_id: docker:{job.image} # has this program\n  " if job.image else ""
    labels = (
        f"labels:\n    {KUEUE}: {job.queue} # Kueue admits the job whole, where Kubernetes is the cloud\n  "
        if job.queue
        else ""
    )
    install = "" if job.image else f"setup: pip install {DISTRIBUTION}=={__version__} # or your wheel, by file_mounts\n"
    volumes = "".join(
        f"  {root}: sluice # {keys}; a volume of yours (sky volumes), with flock and room for checkpoints\n"
        for root, keys in job.mounts.items()
    )
    return f"""# A run by SkyPilot. Start it with: sky jobs launch FILE
# {job.plan_line}
name: {name}
num_nodes: {job.nodes} # {job.size_reason}
resources:
  {device}{image}{labels}memory: {job.memory_gib}+ # GiB {job.memory_reason}
  network_tier: best # experts and pipelines talk between nodes in every layer
  job_recovery:
    max_restarts_on_errors: 5 # the run resumes from runs=, so a retry costs the steps since the last checkpoint
    recover_on_exit_codes: [75] # stopped by a signal, with a checkpoint
{f"volumes:{chr(10)}{volumes}" if volumes else ""}{install}# torchrun and not cluster=ray: SkyPilot runs a Ray of its own on these nodes, which a second one would disturb.
run: |
  torchrun --nnodes="$SKYPILOT_NUM_NODES" --node-rank="$SKYPILOT_NODE_RANK" --nproc-per-node={job.devices} \\
    --master-addr="$(echo "$SKYPILOT_NODE_IPS" | head -n 1)" --master-port=29500 -m train {job.arguments}
"""  # fmt: skip


FILE_KINDS: dict[str, Callable[[Job], str]] = {
    "slurm": _slurm,
    "kuberay": _kuberay,
    "skypilot": _skypilot,
    "torchrun": _torchrun,
}
