"""Plans the seconds of a rank that runs alone, and corrects the job's planned step by measurements.

Transfers of the rank alone take no time; those of the job use the real links. The dry run measures two times of the
rank alone. `plan_again` multiplies the same times of the job by the ratio measured / planned:

    actions     computing time of each kind of action, without transfers
    update      time of reduction and update, without transfers
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from conf.errors import UserError
from conf.schema import Config, Rate
from parallel.pipeline.orders import Action
from parallel.pipeline.simulate import simulate
from train.dry_run.piece import DryRunPiece
from train.parallelize import stage_layers
from train.plan.job import layout_of
from train.plan.time.rates import LINKS, load_rates
from train.plan.time.stages import Stages, require_rule
from train.plan.time.step_time import StepTime, plan_time
from train.plan.time.update import UpdateTime, count_weights, update_time


@dataclass(frozen=True)
class ExpectedTimes:
    """Planned times of a rank that runs alone, in seconds."""

    stages: Stages
    actions: Mapping[str, float]
    """Seconds of the rank's actions in a step, by kind."""
    update: UpdateTime

    @property
    def schedule(self) -> float:
        """Total seconds of the rank's actions in a step."""
        return sum(self.actions.values())


@dataclass(frozen=True)
class Times:
    """Planned times of a dry run and of the job."""

    job: StepTime | None
    """Time of the job's step on the job's hardware; None without rates."""
    piece: ExpectedTimes | None
    """Expected times of the dry run itself; None if the kernel rates belong to another device."""
    whole: ExpectedTimes | None
    """Times of this rank alone, with all layers at full width.

    None if the dry run divides widths, or if the rates are of another device.
    """
    reason: str
    """Why `job`, `piece` or `whole` is None; else empty."""


def expect(piece: DryRunPiece, device: torch.device) -> Times:
    """Plan the times of a dry run and of the job. Raises UserError if the calibration cannot be used."""
    job = piece.job
    if not job.hardware.rates and job.plan.calibration is None:
        return Times(
            None, None, None, "planned times need hardware=NAME with rates, or hardware=cpu with plan.calibration"
        )
    try:
        require_rule(job)
    except UserError as error:
        return Times(None, None, None, f"no planned times: {error.rule}")
    step = plan_time(job)
    if not _is_here(job, device):
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
        return Times(step, None, None, f"measured on {where}, and hardware={job.hardware.name} is another device")
    config = replace(_with_load(piece.config, piece), hardware=job.hardware)
    part = _expected(config, piece, piece.layers, step.actions[piece.pp_rank])
    if piece.shrink > 1:
        return Times(step, part, None, "only times at full width are comparable with the job")
    whole = _expected(_with_load(job, piece), piece, stage_layers(job), step.actions[piece.pp_rank])
    return Times(step, part, whole, "")


def plan_again(times: Times, measured: Mapping[str, float], update: float) -> float:
    """Returns the seconds of the job's step, corrected by the measured times.

    measured: total seconds of a step's actions, by kind
    update: seconds of reduction and update together
    """
    assert times.job is not None and times.piece is not None and times.whole is not None
    job, whole = times.job, times.whole
    planned = times.piece.actions
    factors = {kind: seconds / planned[kind] for kind, seconds in measured.items() if planned.get(kind)}

    def length(action: Action) -> float:
        return job.length(action) + (factors.get(action.kind, 1.0) - 1) * whole.stages.elapsed(action).seconds

    more = (update / times.piece.update.seconds - 1) * whole.update.seconds
    return simulate(job.actions, length, job.transfer_seconds).makespan + job.update.seconds + more


def _is_here(job: Config, device: torch.device) -> bool:
    if device.type == "cuda":
        return job.hardware.device in torch.cuda.get_device_name(device)
    return job.hardware.device == "cpu"


def _with_load(config: Config, piece: DryRunPiece) -> Config:
    """Returns the recipe with plan.imbalance set to this rank's load: rows of its experts / mean rows of a rank."""
    imbalance = sum(piece.load.per_token_L) / piece.job.model.top_k
    return replace(config, plan=replace(config.plan, imbalance=imbalance))


def _expected(config: Config, piece: DryRunPiece, layers: list[range], actions: list[Action]) -> ExpectedTimes:
    layout = layout_of(config)
    rates = load_rates(config, alone=True)
    silent = replace(rates, rates={**rates.rates, **{kind: Rate() for kind in (*LINKS, *LINKS.values())}})
    stages = Stages(config, layout, silent)
    stages.layers = layers
    seconds: defaultdict[str, float] = defaultdict(float)
    for action in actions:
        seconds[action.kind] += stages.elapsed(action).seconds
    held = count_weights(config, layers, piece.stages, len(layers) - 1)
    return ExpectedTimes(stages, seconds, update_time(config, layout, silent, held))
