"""Compares a dry run's measurements with its plan, for dry_run.json and the terminal."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from conf.own_code import targets_of
from conf.screen import Terminal
from train.dry_run.expected import ExpectedTimes, Times, plan_again
from train.dry_run.lone import MeasuredRank
from train.dry_run.piece import DryRunPiece
from train.metrics.quantities import error, gib, seconds
from train.plan.budget import verdict_of
from train.plan.memory.rank_memory import chunk_parts, phases, rank_memory, scene_of
from train.plan.memory.rank_weights import FP32_BYTES, rank_weights
from train.plan.report.plan_record import reserve_words
from train.plan.reserve import reserve_of, tensor_memory
from train.show.screens import GOOD, WARN, show_rows

DRY_RUN_FILE = "dry_run.json"
ACTION_NAMES = {
    "F": "forward",
    "B": "backward",
    "I": "backward, inputs",
    "W": "backward, weights",
    "FB": "overlapped pair",
}
REST = "other tensors at the peak"
"""Label of temporary bytes at the peak, such as activations."""


@dataclass(frozen=True)
class ComparedFigure:
    """A measured and a planned number; None if unknown."""

    measured: float | None
    planned: float | None = None

    @property
    def error(self) -> str:
        return "" if self.planned is None or self.measured is None else error(self.planned, self.measured)

    def record(self) -> dict[str, float | None]:
        return {"measured": self.measured, "planned": self.planned}


@dataclass(frozen=True)
class Findings:
    """All results of one dry run."""

    piece: DryRunPiece
    device: str
    threads: int | None
    """Number of threads, on a CPU."""
    peak: ComparedFigure
    phases: dict[str, ComparedFigure]
    host_phases: dict[str, ComparedFigure]
    """Peaks of host memory by phase; empty on a CPU."""
    items: dict[str, ComparedFigure]
    """Bytes of weights, master weights and moments, and at ZeRO stage 1 of the gradients after a step's passes. `rest`
    is the peak without weights, master weights and moments."""
    actions: dict[str, ComparedFigure]
    """Mean seconds of a step's actions, by kind. The measured number is the median of the timed steps' means."""
    counts: dict[str, int]
    """Number of actions in a step, by kind."""
    steps: dict[str, ComparedFigure]
    """Seconds of a step and its phases. The measured numbers are medians over steps."""
    skipped: int
    """Number of timed steps that did not update the weights."""
    unsaved: str
    """Why no files were saved; empty if saved."""
    job_peak: int
    """Planned peak bytes of this rank in the job, where the rank has all its layers at full width."""
    job_room: int | None
    """Bytes of the job's device that are free at `job_peak`, if known."""
    job_step: float | None
    """Planned seconds of the job's step; None without rates."""
    job_step_again: float | None
    """Seconds of the job's step, corrected by measured times, if possible."""
    reason: str
    """Why `job_step` or `job_step_again` is None, else empty."""


def find(piece: DryRunPiece, measured: MeasuredRank, times: Times, device: torch.device) -> Findings:
    """Returns the measurements with the planned numbers. times: planned times."""
    job, part = piece.job, times.piece
    here = phases(piece.config, piece.pp_rank, piece.rank % job.parallel.stage_ranks, piece.scene, piece.layers)
    job_peak = rank_memory(job, piece.pp_rank, scene_of(job, piece.load)).peak_bytes
    actions = {kind: median(totals) for kind, totals in measured.actions.items()}
    steps = {name: median(each) for name, each in measured.seconds.items()}
    done = measured.phases
    planned_peak = max(one.device for name, one in here.items() if name in done)
    return Findings(
        piece=piece,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        peak=ComparedFigure(measured.peak, planned_peak),
        phases={
            name: ComparedFigure(done[name].device if name in done else None, one.device) for name, one in here.items()
        },
        host_phases={
            name: ComparedFigure(done[name].host if name in done else None, one.host)
            for name, one in here.items()
            if device.type == "cuda"
        },
        items=_items(piece, measured, planned_peak),
        actions={
            kind: ComparedFigure(total / count, part.actions[kind] / count if part else None)
            for kind, total in actions.items()
            if (count := measured.counts[kind])
        },
        counts=dict(measured.counts),
        steps={name: ComparedFigure(each, _planned_phase(part, name)) for name, each in steps.items()},
        skipped=measured.skipped,
        unsaved=measured.unsaved,
        job_peak=job_peak,
        job_room=tensor_memory(job) - job_peak if job.hardware.memory_bytes else None,
        job_step=times.job.step_seconds if times.job else None,
        job_step_again=plan_again(times, actions, steps["reduction"] + steps["update"]) if times.whole else None,
        reason=times.reason,
    )


def _items(piece: DryRunPiece, measured: MeasuredRank, planned_peak: int) -> dict[str, ComparedFigure]:
    """Returns the measured and planned bytes of weights, optimizer state, gradients and the rest (`Findings.items`)."""
    plan = rank_memory(piece.config, piece.pp_rank, piece.scene, piece.layers).items
    state = ("weights", "master", "moments")
    items = {name: ComparedFigure(measured.items[name], plan.get(name, 0)) for name in state}
    if piece.config.parallel.zero == 1:  # at ZeRO 2 and 3, no complete gradients exist after the passes
        chunks = list(chunk_parts(piece.config, piece.layers)[piece.pp_rank].values())
        gradients = FP32_BYTES * sum(w.elements for w in rank_weights(piece.config, chunks) if w.is_trained)
        items["gradients"] = ComparedFigure(measured.items["gradients"], gradients)
    held = sum(measured.items[name] for name in state), sum(items[name].planned or 0 for name in state)
    return items | {"rest": ComparedFigure(measured.peak - held[0], planned_peak - held[1])}


def _planned_phase(part: ExpectedTimes | None, name: str) -> float | None:
    if part is None:
        return None
    planned = {"schedule": part.schedule, "reduction": part.update.reduce, "update": part.update.optimizer}
    return planned.get(name, sum(planned.values()))


def record(found: Findings) -> dict[str, Any]:
    """Returns the content of dry_run.json, in bytes and seconds."""
    piece = found.piece
    stages = {str(stage): [piece.layers[stage].start, piece.layers[stage].stop] for stage in piece.stages}
    return {
        "name": piece.job.name,
        "rank": piece.rank,
        "pp_rank": piece.pp_rank,
        "device": found.device,
        "threads": found.threads,
        "layers": stages,
        "shrink": piece.shrink,
        "layers_left_out": piece.left_out,
        "routing": piece.job.dry_run.routing,
        "rows_per_token": list(piece.load.per_token_L),
        "room_bytes": piece.room,
        "needed_bytes": piece.needed,
        "peak_bytes": found.peak.record(),
        "phase_peak_bytes": {name: one.record() for name, one in found.phases.items()},
        "phase_host_bytes": {name: one.record() for name, one in found.host_phases.items()},
        "item_bytes": {name: one.record() for name, one in found.items.items()},
        "action_seconds": {
            kind: one.record() | {"actions_per_step": found.counts[kind]} for kind, one in found.actions.items()
        },
        "phase_seconds": {name: one.record() for name, one in found.steps.items()},
        "steps_without_update": found.skipped,
        "job_peak_bytes": found.job_peak,
        "job_room_bytes": found.job_room,
        "job_step_seconds": found.job_step,
        "job_step_seconds_measured": found.job_step_again,
    }


def dry_run_screen(found: Findings, folder: Path, console: Console | None = None) -> None:
    """Prints what ran, its memory, its times, and the complete job."""
    piece = found.piece
    rows = [("Ran", _what_ran(found))]
    if piece.left_out:
        needs = f"all layers need {gib(piece.needed)}, and {gib(piece.room)} are free here"
        rows.append(("CUT", f"{_count(piece.left_out, 'layer')} of this rank left out: {needs}"))
    if piece.shrink > 1:
        rows.append(("SHRUNKEN", f"{_shrunken(piece)}: these bytes and seconds are not those of the job"))
    if found.skipped:
        rows.append(
            (
                "SKIPPED",
                f"{_count(found.skipped, 'update')}, because gradients were not finite: the figures of the update are too low",
            )
        )
    if found.unsaved:
        rows.append(("NOT SAVED", f"{found.unsaved}: phases without a measured figure did not run"))
    if own := targets_of(piece.job):
        idle = [key for key in own if key.startswith(("data.", "callbacks"))]
        words = ", ".join(f"{key} ({target})" for key, target in own.items() if key not in idle) or "none"
        rows.append(
            ("Own code", f"ran, and is measured: {words}" + (f"; did not run: {', '.join(idle)}" if idle else ""))
        )
    rows += [
        ("Memory", _table(_memory(found), _size)),
        ("Seconds", _table(_times(found), seconds)),
        ("Job", _job(found)),
        ("Written", str(folder / DRY_RUN_FILE)),
    ]
    peak = f"peak {_size(found.peak.measured or 0)}, plan {found.peak.error}"
    title = f"{piece.job.name}, rank {piece.rank} alone on {found.device}: {peak}"
    show_rows(console or Terminal(), title, GOOD if piece.whole else WARN, rows)


def _what_ran(found: Findings) -> str:
    piece = found.piece
    parallel = piece.job.parallel
    stages = ", ".join(f"stage {stage} with {_layer_words(piece.layers[stage])}" for stage in piece.stages)
    threads = "" if found.threads is None else f"; {_count(found.threads, 'thread')}"
    rows = sum(piece.load.per_token_L)
    experts = f"; {rows:.3g} rows per token for its experts ({piece.job.dry_run.routing})" if parallel.ep > 1 else ""
    return f"pipeline rank {piece.pp_rank} of {parallel.pp} in {parallel.schedule_words}: {stages}{experts}{threads}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _layer_words(layers: range) -> str:
    if not layers:
        return "no layer"
    return f"layer {layers.start}" if len(layers) == 1 else f"layers {layers.start} to {layers.stop - 1}"


def _shrunken(piece: DryRunPiece) -> str:
    model, full = piece.config.model, piece.job.model
    return (
        f"widths, vocabulary and sequence by {piece.shrink} (hidden {model.hidden} of {full.hidden}, sequence "
        f"{piece.config.seq_len} of {piece.job.seq_len})"
    )


def _memory(found: Findings) -> dict[str, ComparedFigure]:
    named = {REST if name == "rest" else name: one for name, one in found.items.items()}
    rows = {"peak": found.peak} | {f"peak in {name}": one for name, one in found.phases.items()} | named
    return rows | {f"host in {name}": one for name, one in found.host_phases.items()}


def _times(found: Findings) -> dict[str, ComparedFigure]:
    actions = {f"{ACTION_NAMES[kind]} (x {found.counts[kind]})": one for kind, one in found.actions.items()}
    return actions | {"whole step" if name == "step" else name: one for name, one in found.steps.items()}


def _size(value: float) -> str:
    """Returns text for a number of bytes, in GiB or MiB."""
    return gib(value) if value >= 2**30 else f"{value / 2**20:.3g} MiB"


def _table(rows: dict[str, ComparedFigure], words: Callable[[float], str]) -> str:
    width = max(map(len, rows))
    lines = [f"{'':{width}}  {'measured':>10}  {'planned':>10}"]
    for name, one in rows.items():
        planned = "-" if one.planned is None else words(one.planned)
        measured = "-" if one.measured is None else words(one.measured)
        lines.append(f"{name:{width}}  {measured:>10}  {planned:>10}  {one.error}".rstrip())
    return "\n".join(lines)


def _job(found: Findings) -> str:
    job = found.piece.job
    where = job.hardware.name or "this device"
    words = f"this rank whole on {where}: {gib(found.job_peak)} planned"
    if found.job_room is not None:
        reserve, memory = reserve_words(reserve_of(job)), int(job.hardware.memory_bytes)
        words += f" of {gib(memory)}, {reserve}: {verdict_of(found.job_room, memory)}"
    if found.job_step is not None:
        words += f"; a step {seconds(found.job_step)} planned"
    if found.job_step_again is not None:
        return f"{words}, {seconds(found.job_step_again)} with the times measured here"
    return f"{words} ({found.reason})"
