"""What a dry run found beside the plan, as dry_run.json and as a screen."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console

from parallel.pipeline.simulate import Action, simulate
from train.dry_run.lone import PHASES, Measured
from train.dry_run.piece import Piece
from train.metrics.screens import GOOD, WARN, show
from train.plan.memory import phases, rank_memory, scene_of
from train.plan.step import StepTime, plan_time
from train.plan.words import gib, seconds

FILE = "dry_run.json"
KINDS = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights", "FB": "overlapped pair"}


@dataclass(frozen=True)
class Compared:
    """A figure, and what the plan said; None where it said nothing."""

    measured: float
    planned: float | None = None

    def record(self) -> dict[str, float | None]:
        return {"measured": self.measured, "planned": self.planned}


@dataclass(frozen=True)
class Findings:
    """Of one dry run."""

    piece: Piece
    device: str
    peak: Compared
    phases: dict[str, Compared]
    items: dict[str, Compared]
    actions: dict[str, Compared]
    """Mean seconds by kind of action."""
    counts: dict[str, int]
    """Actions of a step by kind."""
    steps: dict[str, Compared]
    """Mean seconds of a step and of its phases."""
    job_peak: int
    """Planned peak of the whole rank on the job's own hardware."""
    job_step: Compared | None
    """Seconds of the job's step: planned again with the measured times, and as planned at first. None where the piece is
    not the rank itself, or there are no rates.
    """
    no_job_step: str
    """Why there is none."""


def find(piece: Piece, measured: Measured, device: torch.device) -> Findings:
    """Set what was measured beside the plans."""
    config, job = piece.config, piece.job
    here = phases(config, piece.pp_rank, piece.rank % job.parallel.dp, piece.scene, piece.layers)
    plan = rank_memory(config, piece.pp_rank, piece.scene, piece.layers)
    step, reason = _planned_step(piece)
    actions = {kind: fmean(times) for kind, times in measured.actions.items()}
    planned = {kind: _mean_length(step, piece.pp_rank, kind) if step else None for kind in actions}
    return Findings(
        piece=piece,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        peak=Compared(measured.peak, max(here.values())),
        phases={phase: Compared(measured.phases[phase], here[phase]) for phase in PHASES},
        items={name: Compared(size, plan.items.get(name)) for name, size in measured.items.items()},
        actions={kind: Compared(mean, planned[kind]) for kind, mean in actions.items()},
        counts={kind: len(times) // config.dry_run.steps for kind, times in measured.actions.items()},
        steps={name: Compared(fmean(times)) for name, times in measured.seconds.items()},
        job_peak=rank_memory(job, piece.pp_rank, scene_of(job, piece.load)).peak_bytes,
        job_step=None if step is None else Compared(_again(step, actions, piece.pp_rank, measured), step.step_seconds),
        no_job_step=reason,
    )


def _planned_step(piece: Piece) -> tuple[StepTime | None, str]:
    job = piece.job
    if not piece.whole:
        return None, "only times of the whole rank at full width say something about the job"
    if not job.hardware.rates and job.plan.calibration is None:
        return None, "planned times need hardware=NAME with rates, or plan.calibration=FILE"
    return plan_time(job), ""


def _mean_length(step: StepTime, pp_rank: int, kind: str) -> float | None:
    lengths = [step.length(action) for action in step.actions[pp_rank] if action.kind == kind]
    return fmean(lengths) if lengths else None


def _again(step: StepTime, actions: dict[str, float], pp_rank: int, measured: Measured) -> float:
    """Seconds of the step with every kind of action as much longer as it was on this rank."""
    factors = {}
    for kind, mean in actions.items():
        planned = _mean_length(step, pp_rank, kind)
        factors[kind] = mean / planned if planned else 1.0

    def length(action: Action) -> float:
        return step.length(action) * factors.get(action.kind, 1.0)

    update = fmean(measured.seconds["reduction"]) + fmean(measured.seconds["update"]) + step.update.gather
    return simulate(step.actions, length).makespan + update


def record(found: Findings) -> dict[str, Any]:
    """dry_run.json. Bytes and seconds."""
    piece = found.piece
    stages = {str(stage): [piece.layers[stage].start, piece.layers[stage].stop] for stage in piece.stages}
    return {
        "name": piece.job.name,
        "rank": piece.rank,
        "pp_rank": piece.pp_rank,
        "device": found.device,
        "layers": stages,
        "shrink": piece.shrink,
        "layers_left_out": piece.left_out,
        "routing": piece.job.dry_run.routing,
        "rows_per_token": list(piece.load.per_token_L),
        "room_bytes": piece.room,
        "needed_bytes": piece.needed,
        "peak_bytes": found.peak.record(),
        "phase_peak_bytes": {name: one.record() for name, one in found.phases.items()},
        "item_bytes": {name: one.record() for name, one in found.items.items()},
        "action_seconds": {
            kind: one.record() | {"actions_per_step": found.counts[kind]} for kind, one in found.actions.items()
        },
        "step_seconds": {name: one.measured for name, one in found.steps.items()},
        "job_peak_bytes": found.job_peak,
        "job_step_seconds": None if found.job_step is None else found.job_step.record(),
    }


def dry_run_screen(found: Findings, folder: Path, console: Console | None = None) -> None:
    """The findings on one screen: what ran, then memory, times, and the job."""
    piece = found.piece
    rows = [("Ran", _what_ran(piece))]
    if piece.left_out:
        needs = f"all layers need {gib(piece.needed)}, and {gib(piece.room)} are free here"
        rows.append(("CUT", f"{piece.left_out} layers of this rank are left out: {needs}"))
    if piece.shrink > 1:
        rows.append(("SHRUNKEN", f"{_shrunken(piece)}: neither these bytes nor these seconds are those of the job"))
    rows += [
        ("Memory", _table({name.replace("_", " "): one for name, one in _memory(found).items()}, _size)),
        ("Seconds", _table(_times(found), seconds)),
        ("Job", _job(found)),
        ("Written", str(folder / FILE)),
    ]
    error = found.peak.planned / found.peak.measured - 1 if found.peak.planned else 0.0
    title = f"{piece.job.name}, rank {piece.rank} alone on {found.device}: peak {_size(found.peak.measured)}, plan {100 * error:+.1f} %"
    show(console or Console(highlight=False), title, GOOD if piece.whole else WARN, rows)


def _what_ran(piece: Piece) -> str:
    parallel = piece.job.parallel
    stages = ", ".join(f"stage {stage} with {_layer_words(piece.layers[stage])}" for stage in piece.stages)
    rows = sum(piece.load.per_token_L)
    experts = f"; {rows:.3g} rows per token for its experts ({piece.job.dry_run.routing})" if parallel.ep > 1 else ""
    return f"pipeline rank {piece.pp_rank} of {parallel.pp} in {parallel.schedule}: {stages}{experts}"


def _layer_words(layers: range) -> str:
    if not layers:
        return "no layer"
    return f"layer {layers.start}" if len(layers) == 1 else f"layers {layers.start} to {layers.stop - 1}"


def _shrunken(piece: Piece) -> str:
    model, full = piece.config.model, piece.job.model
    return (
        f"widths, vocabulary and sequence by {piece.shrink} (hidden {model.hidden} of {full.hidden}, sequence "
        f"{piece.config.seq_len} of {piece.job.seq_len})"
    )


def _memory(found: Findings) -> dict[str, Compared]:
    return {"peak": found.peak} | {f"peak in {name}": one for name, one in found.phases.items()} | found.items


def _times(found: Findings) -> dict[str, Compared]:
    actions = {f"{KINDS[kind]} (x {found.counts[kind]})": one for kind, one in found.actions.items()}
    return actions | found.steps


def _size(value: float) -> str:
    """As gib, with three digits below one GiB."""
    return gib(value) if value >= 2**30 else f"{value / 2**20:.3g} MiB"


def _table(rows: dict[str, Compared], words: Callable[[float], str]) -> str:
    width = max(map(len, rows))
    lines = [f"{'':{width}}  {'measured':>10}  {'planned':>10}"]
    for name, one in rows.items():
        planned, error = ("-", "") if one.planned is None else (words(one.planned), _error(one))
        lines.append(f"{name:{width}}  {words(one.measured):>10}  {planned:>10}  {error}".rstrip())
    return "\n".join(lines)


def _error(one: Compared) -> str:
    return f"{100 * (one.planned / one.measured - 1):+.1f} %" if one.measured else ""


def _job(found: Findings) -> str:
    where = found.piece.job.hardware.name or "this device"
    memory = f"this rank whole, at full width, on {where}: {gib(found.job_peak)} planned"
    if found.job_step is None:
        return f"{memory}; no step time: {found.no_job_step}"
    step = found.job_step
    return f"{memory}; a step {seconds(step.measured)} with the times measured here, {seconds(step.planned)} planned"
