"""Prints a plan on the terminal; the first line says whether the run fits."""

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from conf.schema import Config
from conf.screen import Terminal
from train.metrics.quantities import amount, gib, seconds, share
from train.model.count import count_adapter, count_parameters
from train.optim.matrices import logical_matrices
from train.plan.budget import RunPlan, Verdict, room_words
from train.plan.job import device_memory
from train.plan.memory.part import FrozenSection
from train.plan.memory.rank_weights import part_weights
from train.plan.report.plan_page import PLAN_PAGE
from train.plan.report.plan_record import (
    budget_words,
    disk_words,
    failure_words,
    interval_words,
    layout_words,
    own_code_words,
    reserve_words,
    split_words,
    verdict,
)
from train.plan.reserve import host_memory
from train.plan.search.cures import Cure, FasterSplit
from train.plan.search.search import FoundLayout, Search
from train.show.planned import PLAN_FILE
from train.show.screens import GOOD, WARN, show_rows


def plan_screen(
    plan: RunPlan,
    cures: list[Cure],
    split: FasterSplit | None,
    faster_stages: Cure | None,
    phases: Sequence[tuple[str, RunPlan]],
    folder: Path,
    console: Console | None = None,
) -> None:
    """Prints the plan on one screen."""
    config, step = plan.config, plan.step
    parallel = config.parallel
    devices = parallel.world
    rows = [("Fullest", _fullest(plan))]
    if plan.reserve:
        rows.append(("Margins", _beside(plan)))
    if not plan.fits:
        rows += [("Cure", cure_words(cure, plan)) for cure in cures] or [
            (
                "Cure",
                "no tested change is sufficient: use more devices or a smaller model (plan.search=true tests more)",
            )
        ]
    update = step.update
    rows += [
        ("Layout", layout_words(plan)),
        *([("Host", _host(plan))] if plan.host_bytes else []),
        ("Disk", disk_words(plan)),
        ("Phases", _phases(plan)),
        *([("Split", stages)] if (stages := split_words(plan, split)) is not None else []),
        *([("Stages", cure_words(faster_stages, plan))] if faster_stages is not None else []),
        (
            "Step",
            f"{seconds(step.step_seconds)}{interval_words(step)}: pipeline {seconds(step.pipeline_seconds)} with {share(step.bubble_share)} bubble, "
            f"reduction {seconds(update.reduce)}, optimizer {seconds(update.optimizer)}, gather {seconds(update.gather)}",
        ),
        *([("Launches", _launches(plan))] if step.host_seconds else []),
        *([("Adapter", _adapter(plan))] if config.adapter.on else []),
        *([("Matrices", _matrices(config))] if config.optim.facts.matrices.is_whole else []),
        ("Experts", _exchange(plan)),
        ("Speed", _speed(plan)),
        *_run(plan, phases),
        ("Rates", step.rates),
    ]
    if own := own_code_words(config):
        rows.append(("Own code", "\n".join(f"{what}: {words}" for what, words in own.items())))
    rows.append(("Written", f"{folder / PLAN_FILE}, {folder / PLAN_PAGE}  (open it in a browser)"))
    what = f"{config.name} on {devices} x {config.hardware.name}"
    show_rows(
        console or Terminal(),
        f"{what}: {verdict(plan)}",
        GOOD if plan.verdict == Verdict.fits else WARN,
        rows,
    )


def _fullest(plan: RunPlan) -> str:
    items = sorted(plan.fullest.items.items(), key=lambda item: -item[1])[:4]
    parts = ", ".join(f"{name.replace('_', ' ')} {gib(size)}" for name, size in items)
    return f"{gib(plan.fullest.peak_bytes)} at the {plan.fullest.peak_event}: {parts}"


def _beside(plan: RunPlan) -> str:
    """Returns text about reserved memory and the experts' assumed imbalance."""
    imbalance = plan.config.plan.imbalance
    more = (
        f"; the busiest experts get {imbalance:g} times the mean (plan.imbalance)"
        if plan.config.parallel.ep > 1
        else ""
    )
    return f"{reserve_words(plan.reserve)}{more}"


def _host(plan: RunPlan) -> str:
    has = host_memory(plan.config)
    fullest = max(plan.ranks, key=lambda rank: rank.host_bytes)
    parts = ", ".join(f"{name} {gib(size)}" for name, size in fullest.host_items.items())
    whole = f"the {gib(has)} that a host has for tensors" if has else "the host's memory, of unknown size"
    return f"{gib(plan.host_bytes)} of {whole}; a rank has {parts}"


def _phases(plan: RunPlan) -> str:
    rank = plan.fullest
    words = [
        f"{name} {gib(one.device)}" + (f" and {gib(one.host)}" if one.host else "") for name, one in rank.phases.items()
    ]
    return f"peaks of rank {rank.pp_rank}{' and of its host' if rank.host_bytes else ''}: {', '.join(words)}"


def cure_words(cure: Cure, plan: RunPlan) -> str:
    slower = cure.step_seconds / plan.step.step_seconds - 1
    more = f" on {cure.devices} devices" if cure.devices != plan.config.parallel.world else ""
    return f"{shlex.join(cure.overrides)}{more}: {room_words(cure.room_bytes, plan.memory_bytes)}, {100 * slower:+.1f} % time a step"


def _matrices(config: Config) -> str:
    """Returns text about the matrices that the optimizer orthogonalises."""
    found: dict[str, Counter[tuple[int, int]]] = {}
    for part in ("dense", "moe", *["end"] * (config.model.mtp_depth > 0)):
        for weight in part_weights(FrozenSection(config.model), part, config.model.experts):
            if config.optim.facts.choose_rule(weight.name, len(weight.shape)).is_whole:
                kind = re.sub(r"^(layers|mtp)\.\d+\.(block\.)?|\.weight$", "", weight.name)
                matrices = logical_matrices(weight.name, weight.shape, config.model, config.optim.muon.by_head)
                found[kind] = Counter(one.shape for one in matrices)
    return ", ".join(
        f"{kind} {' and '.join(f'{count} of {rows} x {columns}' for (rows, columns), count in shapes.items())}"
        for kind, shapes in found.items()
    )


def _adapter(plan: RunPlan) -> str:
    """Returns text about trained parameters and the storage of frozen weights."""
    counts = count_parameters(plan.config.model)
    frozen = "ZeRO 1 and 2 shard only optimizer state: every rank of a stage has all its frozen weights, except experts of other ep ranks"
    if plan.config.parallel.zero == 3:
        frozen = "ZeRO 3 shards frozen weights too, and gathers them before their block"
    return (
        f"{amount(count_adapter(plan.config))} of {amount(counts.total + counts.mtp)} parameters are trained; {frozen}"
    )


def _launches(plan: RunPlan) -> str:
    step = plan.step
    said = f"{seconds(step.host_seconds)} of a CPU core per rank start {seconds(sum(step.work_seconds.values()))} of kernels"
    if not step.host_binds:
        return said
    binds = "the host binds, and the step takes longer than planned"
    if step.host_share < 1:
        binds = "the host may bind, and the step then takes up to twice as long as planned"
    return f"{said}: {binds}. With larger micro-batches each kernel runs longer"


def _exchange(plan: RunPlan) -> str:
    step = plan.step
    if plan.config.parallel.ep == 1:
        return "every rank has all experts"
    return f"{seconds(step.exchange_seconds)} of exchanges per step and rank, {seconds(step.exposed_communication_seconds)} of them exposed"


def _speed(plan: RunPlan) -> str:
    step = plan.step
    mfu = f", MFU {share(step.mfu_causal)} causal, {share(step.mfu_full)} not" if step.mfu_causal is not None else ""
    return f"{step.tokens_per_second_per_gpu:.0f} tokens/s per device, {amount(step.tokens_per_second)}/s in total{mfu}"


def _run(plan: RunPlan, phases: Sequence[tuple[str, RunPlan]]) -> list[tuple[str, str]]:
    hardware, budget = plan.config.hardware, plan.budget
    alone = "" if plan.failures is None else "without failures, "
    rows = [("Run", alone + budget_words(budget, hardware))]
    for name, phase in phases:
        rows.append(
            (
                "Then",
                f"{name}, {phase.verdict}, {seconds(phase.step.step_seconds)} a step: {budget_words(phase.budget, hardware)}",
            )
        )
        budget = budget + phase.budget
    if phases:
        rows.append(("In all", budget_words(budget, hardware)))
    words = failure_words(plan)
    return rows if words is None else [*rows, ("Failures", words)]


def search_screen(found: Search, written: Path | None, console: Console | None = None) -> None:
    """Prints a search's best layouts, and why other families of layouts are not among them."""
    rows = [(str(place), _found(one, found)) for place, one in enumerate(found.best, 1)]
    rows += [("Not", f"{family.name}: {family.reason}") for family in found.rejected]
    if written is not None:
        rows.append(("Written", f"{written}  (use it with {shlex.join(found.command(written.stem))})"))
    title = f"{len(found.best)} best of {found.tried} layouts on {found.devices} devices"
    title += "" if found.complete else ", stopped by Ctrl-C"
    show_rows(console or Terminal(), title, GOOD, rows)


def _found(one: FoundLayout, search: Search) -> str:
    words = shlex.join(one.overrides) or "the recipe as it is"
    return f"{seconds(one.step_seconds)} a step, {room_words(one.room_bytes, device_memory(one.config))}: {words}"


def calibration_screen(path: Path, console: Console | None = None) -> None:
    rows = [("Written", str(path)), ("Use it with", f"mode=plan plan.calibration={path}")]
    show_rows(console or Terminal(), "calibrated this device", GOOD, rows)
