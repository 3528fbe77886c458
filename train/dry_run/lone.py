"""Runs one rank of a job without the other ranks, in torch's fake process group, which moves no data.

Stand-in stages create the tensors of other pipeline ranks. A stand-in dispatcher returns as many rows as `Load`
defines. Their values are arbitrary, so the losses have no meaning.
"""

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import UserError
from conf.schema import Config
from conf.words import say
from parallel.context import LoneContext
from parallel.expert.build import build_stand_in, build_wire
from parallel.mesh import build_mesh
from parallel.pipeline.stage import LoneStage
from train.dry_run.assumed_rows import group_of
from train.dry_run.piece import DryRunPiece
from train.dry_run.run_phases import RunPhases
from train.kernels.choice import choose_kernels
from train.loop.hooks.profiler import StepProfiler
from train.parallelize import parallelize
from train.plan.job import layout_of
from train.plan.memory.ledger import PeakMeter, PhaseBytes
from train.plan.time.timed_step import TimedStep
from train.rank_parts import ParallelModel, RankSetup


@dataclass
class MeasuredRank:
    """Measurements of a rank, in bytes and seconds."""

    phases: dict[str, PhaseBytes] = field(default_factory=dict)
    """Memory peaks by phase, named as in `train.plan.memory.rank_memory.phases`."""
    unsaved: str = ""
    """Why no files were saved; empty if saved."""
    items: dict[str, int] = field(default_factory=dict)
    """Bytes of weights, master weights, moments and gradients, measured after a step's passes."""
    actions: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Total seconds of each kind of action, in each timed step."""
    counts: Counter[str] = field(default_factory=Counter)
    """Number of actions in a step, by kind."""
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Seconds by phase, per timed step; `step` is the complete step."""
    skipped: int = 0
    """Number of timed steps without update, because gradients were not finite."""

    @property
    def peak(self) -> int:
        return max(one.device for one in self.phases.values())


def run_alone(piece: DryRunPiece, device: torch.device, folder: Path | None = None) -> MeasuredRank:
    """Run the rank alone through all phases of a run, and measure it.

    1. Start and a warm-up step.
    2. Work outside of steps, and one step, with measured memory.
    3. The timed steps.
    4. Starts from the rank's saved files.

    folder: folder for temporary files; None: the system's folder
    Raises UserError if the device's memory runs out.
    """
    config = piece.config
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    layout = layout_of(config)
    dist.init_process_group("fake", rank=piece.rank, world_size=layout.world)
    try:
        dispatcher = None
        if layout.ep > 1:
            wire = build_wire(config.parallel.wire, config.precision.fp8 is not None)
            dispatcher = build_stand_in(config.parallel.dispatch, group_of(config), wire, piece.load)
        mesh, (kernels, _) = build_mesh(layout), choose_kernels(config, device)  # a run uses the same kernels
        share = LoneContext(layout.cp, mesh.cp_rank) if layout.cp > 1 else None
        rank, more = RankSetup(device, mesh), {"dispatcher": dispatcher, "layers": piece.layers, "share": share}

        is_alone = layout.world > 1 or piece.left_out > 0

        def build(restored: bool) -> ParallelModel:
            return parallelize(config, mesh, device, kernels, restored=restored, **more)

        with (
            TemporaryDirectory(prefix="saved_", dir=folder) as saved,
            RunPhases(config, rank, Path(saved), build, is_alone=is_alone) as life,
        ):
            measured = _train(config, life, rank, piece.rank)
            life.begin_again()
        return replace(measured, phases=life.peaks, unsaved=life.unsaved)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "dry_run.shrink",
            config.dry_run.shrink,
            f"this device is out of memory: {str(error).splitlines()[0]}",
            "end other processes on the device, or set dry_run.shrink=2",
        ) from error
    finally:
        dist.destroy_process_group()


def _train(config: Config, life: RunPhases, rank: RankSetup, number: int) -> MeasuredRank:
    parts, state = life.begin("start")
    parts.pipeline.stage_type = LoneStage
    timed = TimedStep(config, parts, rank)

    def run(number: int, measured: MeasuredRank, meter: PeakMeter | None = None) -> None:
        def end(phase: str) -> None:
            if meter is not None:
                life.mark(phase, meter)
                if phase == "schedule":
                    measured.items = _items(parts)

        outcome, seconds = timed.run(number, end)
        measured.skipped += not outcome.update.applied
        for phase, value in (seconds | {"step": sum(seconds.values())}).items():
            measured.seconds[phase].append(value)
        actions = parts.pipeline.timeline.newest().actions
        measured.counts = Counter(action.kind for action in actions)
        for kind in measured.counts:
            measured.actions[kind].append(sum(action.seconds for action in actions if action.kind == kind))

    measured = MeasuredRank()
    run(1, MeasuredRank())
    with life.meter() as meter:
        life.go_on(parts, state, timed.tokens_BS, meter)
        run(2, measured, meter)
    measured = replace(MeasuredRank(), items=measured.items)
    for step in range(3, 3 + config.dry_run.steps):
        run(step, measured)
    if config.profile.steps:
        _watch(config, parts, rank, number)
    parts.zero.engine.destroy()  # otherwise its hooks would keep all objects alive while a sweep runs its next job
    return measured


def _watch(config: Config, parts: ParallelModel, rank: RankSetup, number: int) -> None:
    """Run the steps of profile.steps under the profiler."""
    watched = replace(config, profile=replace(config.profile, ranks=[number]))
    timed, (first, last) = TimedStep(config, parts, rank), config.profile.steps
    with closing(StepProfiler(watched, number, parts)) as profiler:
        for step in range(first, last + 1):
            profiler.begin(step)
            timed.run(step)
            profiler.end(step, say)


def _items(parts: ParallelModel) -> dict[str, int]:
    """Returns the bytes of weights, master weights, moments and gradients."""
    shards = parts.zero.shards(copies=True)
    return {
        "weights": _bytes(parts.zero.weights()),
        "master": _bytes(shard.local for name, shard in shards.items() if name.startswith("master.")),
        "moments": _bytes(shard.local for name, shard in shards.items() if not name.startswith("master.")),
        "gradients": _bytes(param.grad for param in parts.zero.names if param.grad is not None),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of storages; a shared storage counts once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
