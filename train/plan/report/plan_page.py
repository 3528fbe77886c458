"""Writes plan.html, a page that shows a plan and needs no network."""

import html
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from conf.files import atomic_write_text
from train.metrics.names import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY
from train.metrics.quantities import GIB, amount, gib, length_of_run, seconds, share
from train.metrics.timeline_file import SampledStep
from train.plan.budget import RunPlan
from train.plan.job import host_ranks
from train.plan.report.plan_record import (
    failure_words,
    interval_words,
    layout_words,
    reserve_words,
    split_words,
    verdict,
)
from train.plan.reserve import host_memory
from train.plan.search.cures import FasterSplit
from train.show.headline import Card
from train.show.pipeline_figures import timeline_figure
from train.show.plot import Figure, figure, set_look
from train.show.report_page import HOW_TO_READ, cards_html, closing, figure_html, opening, table_html

PLAN_PAGE = "plan.html"
BAR_COLOURS = (BLUE, SKY, GREEN, "#93D9C3", ORANGE, "#E69F00", PURPLE, "#7A8B1C", GREY, "#B0B4BA", "#5B4A8A", "#C9A27E")


def write_page(path: Path, plan: RunPlan, split: FasterSplit | None, record: dict[str, Any]) -> None:
    """Write the page atomically. record: content of plan.json."""
    atomic_write_text(path, "\n".join(_parts(plan, split, record)))


def _parts(plan: RunPlan, split: FasterSplit | None, record: dict[str, Any]) -> list[str]:
    config = plan.config
    devices = config.parallel.world
    parts = opening(
        f"Plan: {config.name} on {devices} x {config.hardware.name}", f"It {verdict(plan)}. {layout_words(plan)}."
    )
    made = (
        memory_figure(plan),
        host_figure(plan),
        interval_figure(plan, record),
        traffic_figure(record),
        time_figure(plan),
        step_figure(plan),
    )
    figures = [figure for figure in made if figure is not None]
    drawn = "".join(map(figure_html, figures))
    notes = [f"Rates: {plan.step.rates}.", f"Memory of each device: {reserve_words(plan.reserve)}."]
    if (stages := split_words(plan, split)) is not None:
        notes.append(f"Stages: {stages}.")
    if (failures := failure_words(plan)) is not None:
        notes.append(f"Failures: {failures}.")
    parts += [
        f'<h2>At a glance</h2><div class="cards">{cards_html(_cards(plan))}</div>',
        "".join(f"<p>{html.escape(note)}</p>" for note in notes),
        *_cures(record),
        *_search(record),
        f'<h2>Memory and time</h2><p class="sub">{HOW_TO_READ}</p><div class="figures">{drawn}</div>',
        "<h2>Phases</h2>",
        _phases(plan),
        "<h2>Stages</h2>",
        _stages(record),
        "<h2>Everything</h2><details><summary>plan.json</summary>",
        f"<pre>{html.escape(json.dumps(record, indent=1))}</pre></details>",
        *closing(figures),
    ]
    return parts


def _cards(plan: RunPlan) -> list[Card]:
    step, budget = plan.step, plan.lasting
    cards = [
        Card(
            "Memory",
            plan.verdict,
            f"{gib(plan.fullest.peak_bytes)} and {gib(sum(plan.reserve.values()))} reserved of {gib(plan.memory_bytes)} "
            f"on rank {plan.fullest.pp_rank}",
        ),
        Card(
            "Step",
            seconds(step.step_seconds),
            f"{share(step.bubble_share)} of the pipeline's time is bubble{interval_words(step)}",
        ),
        Card("Speed", f"{step.tokens_per_second_per_gpu:.0f}", "tokens per second and device"),
        Card(
            "MFU",
            share(step.mfu_causal),
            "of the bf16 peak; attention counts only visible keys, and MTP does not count",
        ),
        Card("Run", length_of_run(budget.days), f"for {amount(budget.tokens)} tokens"),
        Card(
            "Device hours",
            amount(budget.gpu_hours),
            f"{amount(budget.gpu_hours_per_trillion_tokens)} per trillion tokens",
        ),
    ]
    if budget.cost is not None:
        hardware = plan.config.hardware
        price = f"{hardware.price_per_hour:g} {hardware.currency}"
        cards.append(Card("Cost", f"{amount(budget.cost)} {hardware.currency}", f"at {price} an hour and device"))
    if budget.energy_kwh is not None:
        cards.append(Card("Energy", f"{amount(budget.energy_kwh)} kWh", "of the devices at their power limit"))
    if plan.failures is not None:
        best, steps = plan.failures.best_share, plan.failures.best_steps
        advised = "" if best is None else f"; {share(best)} with a checkpoint every {steps} steps"
        words = f"what failures and checkpoints leave; run, hours, cost and energy include their time{advised}"
        cards.append(Card("Effective time", share(plan.failures.effective_share), words))
    return cards


def _cures(record: dict[str, Any]) -> list[str]:
    faster = [record["faster_stages"]] if record["faster_stages"] is not None else []
    parts = []
    for title, cures in (("What would make it fit", record["cures"]), ("What would be faster", faster)):
        rows = [
            (
                shlex.join(cure["overrides"]),
                gib(cure["room_bytes"]),
                seconds(cure["step_seconds"]),
                str(cure["devices"]),
            )
            for cure in cures
        ]
        parts += [f"<h2>{title}</h2>", table_html(("change", "room left", "step", "devices"), rows)] if rows else []
    return parts


def _search(record: dict[str, Any]) -> list[str]:
    """Returns a table of a search's best layouts."""
    if "search" not in record:
        return []
    best = record["search"]["best"]
    settings = [dict(word.split("=", 1) for word in one["overrides"]) for one in best]
    columns = {
        "layout": [str(place) for place, _ in enumerate(best, 1)],
        "step": [seconds(one["step_seconds"]) for one in best],
        "room left": [gib(one["room_bytes"]) for one in best],
        "device hours": [amount(one["gpu_hours"]) for one in best],
        "cost": ["" if one["cost"] is None else amount(one["cost"]) for one in best],
        "effective time": ["" if one["effective_share"] is None else share(one["effective_share"]) for one in best],
    } | {key: [one.get(key, "") for one in settings] for one in settings for key in one}
    shown = {name.rpartition(".")[2].replace("_", " "): values for name, values in columns.items() if any(values)}
    return [
        "<h2>Layouts that a search has found</h2>",
        '<p class="sub">An empty cell means that the layout keeps the value of the recipe.</p>',
        table_html(shown, zip(*shown.values(), strict=True), whole=True),
    ]


PLANNED_PHASES = {
    "start": "start: weights and the optimizer's state are built",
    "schedule": "forward and backward passes",
    "reduction": "reduction of gradients",
    "update": "update of the weights",
    "average": "average of the weights",
    "validation": "validation",
    "checkpoint": "checkpoint",
    "copies": "copies in the memory of nodes",
    "export": "export of the weights",
    "resume": "start from a checkpoint",
    "init_from": "start from a folder of weights",
}
"""Descriptions of the phases, as named in `phases` (train/plan/memory/rank_memory.py)."""


def _phases(plan: RunPlan) -> str:
    """Returns a table of the fullest rank's peaks by phase."""
    rank = plan.fullest
    rows = [(PLANNED_PHASES[name], gib(one.device), gib(one.host)) for name, one in rank.phases.items()]
    return table_html((f"phase, of rank {rank.pp_rank}", "device", "host"), rows)


def _stages(record: dict[str, Any]) -> str:
    """Returns a table of the stages. Equal consecutive stages share a row."""
    rows = []
    for (layers, *times), group in groupby(record["stages"], key=_shown):
        alike = list(group)
        first, last = alike[0], alike[-1]
        end = last["first_layer"] + last["layers"] - 1
        ranks = sorted({stage["pp_rank"] for stage in alike})
        rows.append(
            (
                _span(first["stage"], last["stage"]),
                _span(ranks[0], ranks[-1]) if len(ranks) == ranks[-1] - ranks[0] + 1 else ", ".join(map(str, ranks)),
                f"{_span(first['first_layer'], end)}{f', {layers} each' if len(alike) > 1 else ''}"
                if layers
                else "none",
                *times,
            )
        )
    return table_html(("stage", "pipeline rank", "layers", "forward of a micro-batch", "backward"), rows)


def _shown(stage: dict[str, Any]) -> tuple[Any, ...]:
    return stage["layers"], seconds(stage["forward_seconds"]), seconds(stage["backward_seconds"])


def _span(first: int, last: int) -> str:
    return f"{first} to {last}" if last > first else str(first)


def memory_figure(plan: RunPlan) -> Figure | None:
    """Returns a figure of memory items by pipeline rank."""
    caption = (
        "The memory of each pipeline rank at its own peak. All pipelines are equal. "
        "The line is the device's memory without the reserve. "
        f"Rank {plan.fullest.pp_rank} needs the most memory, at the {plan.fullest.peak_event}."
    )
    limit = plan.memory_bytes - sum(plan.reserve.values())
    return _bars("memory", "Memory of every rank", caption, [rank.items for rank in plan.ranks], limit, "for tensors")


def host_figure(plan: RunPlan) -> Figure | None:
    """Returns a figure of host memory by pipeline rank, if any."""
    if not plan.host_bytes:
        return None
    caption = "The peak of each rank's tensors in the memory of its host. The line is a rank's equal share of the memory that a host has for tensors."
    limit = host_memory(plan.config) / host_ranks(plan.config)
    return _bars(
        "host", "Memory of the hosts", caption, [rank.host_items for rank in plan.ranks], limit, "a rank's share"
    )


def _bars(
    key: str, title: str, caption: str, ranks: Sequence[Mapping[str, int]], limit: float, what: str
) -> Figure | None:
    """Returns a figure of memory items by pipeline rank, with a line.

    limit: bytes at the line; 0 for no line
    what: label of the line
    """
    plot = go.Figure()
    totals = {name: sum(rank.get(name, 0) for rank in ranks) for rank in ranks for name in rank}
    for colour, name in zip(BAR_COLOURS, sorted(totals, key=lambda name: -totals[name]), strict=False):
        label = name.replace("_", " ")
        plot.add_bar(
            name=label,
            x=[f"{number}" for number in range(len(ranks))],
            y=[rank.get(name, 0) / GIB for rank in ranks],
            marker={"color": colour},
            hovertemplate=f"{label} %{{y:.2f}} GiB<extra></extra>",
        )
    set_look(plot, 420)
    plot.update_layout(barmode="stack", bargap=0.25)
    if limit:
        plot.add_hline(
            y=limit / GIB,
            line={"color": ORANGE, "dash": "dash"},
            annotation_text=f"{what}: {limit / GIB:.1f} GiB",
            annotation_position="top right",
        )
    plot.update_xaxes(title="pipeline rank", type="category")
    plot.update_yaxes(title="GiB", rangemode="tozero")
    return figure(key, title, caption, plot)


def interval_figure(plan: RunPlan, record: dict[str, Any]) -> Figure | None:
    """Returns a figure of expected ranges of step times, if known.

    Rows: the plan and its phases, or the best layouts of a search.
    """
    intervals = plan.step.intervals
    if not intervals:
        return None
    rows = [
        (plan.config.name, plan.step.step_seconds),
        *((one["name"], one["step_seconds"]) for one in record["phases"]),
    ]
    if "search" in record:
        rows = [(f"layout {place}", one["step_seconds"]) for place, one in enumerate(record["search"]["best"], 1)]
    labels, steps = [name for name, _ in rows], [value for _, value in rows]
    plot = go.Figure()
    hover = "%{y}: %{x:.4g} s, +%{error_x.array:.3g} and -%{error_x.arrayminus:.3g}<extra></extra>"
    for (kind, one), colour in zip(intervals.items(), (SKY, BLUE), strict=True):
        under, over = ([abs(value * math.expm1(end)) for value in steps] for end in (one.low, one.high))
        bars = {"type": "data", "symmetric": False, "array": over, "arrayminus": under, "thickness": 3, "width": 8}
        plot.add_scatter(
            name=kind, x=steps, y=labels, mode="markers", error_x=bars, marker={"color": colour, "size": 11}, hovertemplate=hover
        )  # fmt: skip
    set_look(plot, max(320, 180 + 24 * len(rows)))
    plot.update_yaxes(autorange="reversed", automargin=True, type="category")
    plot.update_xaxes(title="seconds of a step", rangemode="tozero")
    caption = "The planned step time with two intervals. Plans of published jobs, made without their measured times, had the measured time in such an interval for about four of five jobs. The interval of tuned Megatron comes from jobs of tuned Megatron. The interval of this program comes from jobs of all kinds of programs, because no GPU has timed it."
    return figure("interval", "How long a step may take", caption, plot)


LINKS_SHOWN = {"inside": "inside a node", "across": "between nodes", "host": "to and from the host"}


def traffic_figure(record: dict[str, Any]) -> Figure | None:
    """Returns a figure of the bytes that a device sends per step."""
    found = {link: each for link, each in record["link_bytes"].items() if each}
    plot = go.Figure()
    for colour, what in zip(BAR_COLOURS, sorted({what for each in found.values() for what in each}), strict=False):
        sizes = [each.get(what, 0) / GIB for each in found.values()]
        hover = f"{what}, %{{y}}: %{{x:.4g}} GiB<extra></extra>"
        labels = [LINKS_SHOWN[link] for link in found]
        plot.add_bar(name=what, y=labels, x=sizes, orientation="h", marker={"color": colour}, hovertemplate=hover)
    if not plot.data:
        return None
    set_look(plot, max(320, 240 + 40 * len(found)))
    plot.update_layout(barmode="stack", hovermode="closest")
    plot.update_yaxes(autorange="reversed", automargin=True)
    plot.update_xaxes(title="GiB in a step")
    caption = "Bytes that a device sends in a step, as a mean over the ranks of a pipeline. In a ring over several nodes, one rank of each node sends to the next node."
    return figure("traffic", "Traffic by kind of link", caption, plot)


def time_figure(plan: RunPlan) -> Figure | None:
    """Returns a figure of a rank's seconds in a step, by action (such as forward) and by kind of kernel."""
    step = plan.step
    names = {"F": "forward", "B": "backward", "I": "backward of inputs", "W": "backward of weights", "FB": "pairs"}
    actions = [(names[kind], value) for kind, value in step.action_seconds.items()]
    whole = [*actions, ("bubble", step.bubble_seconds), ("reduction", step.update.reduce)]
    whole += [("optimizer", step.update.optimizer), ("gather", step.update.gather)]
    work = list(step.work_seconds.items())[:14]
    if step.exposed_communication_seconds:
        work.append(("waiting for experts", step.exposed_communication_seconds))
    plot = go.Figure()
    for title, rows, colour in (("of the step", whole, BLUE), ("of the work inside", work, GREEN)):
        labels, values = [name.replace("_", " ") for name, _ in rows], [value for _, value in rows]
        hover = "%{y}: %{x:.4g} s<extra></extra>"
        plot.add_bar(name=title, y=labels, x=values, orientation="h", marker={"color": colour}, hovertemplate=hover)
    set_look(plot, 200 + 22 * (len(whole) + len(work)))
    plot.update_layout(hovermode="closest")
    plot.update_yaxes(autorange="reversed", automargin=True)
    plot.update_xaxes(title="seconds of a step")
    caption = (
        "Blue: the parts of a rank's step, as a mean over the ranks of a pipeline. Green: the kernels inside these parts, and the "
        "time in which the rank waits for tokens that travel to or from experts."
    )
    return figure("time", "Where the time goes", caption, plot, True)


def step_figure(plan: RunPlan) -> Figure | None:
    """Returns a figure of the pipeline's planned step."""
    step = plan.step
    actions = []
    for pp_rank, (line, starts) in enumerate(zip(step.actions, step.simulation.starts, strict=True)):
        for action, start in zip(line, starts, strict=True):
            one: dict[str, Any] = {
                "pp_rank": pp_rank,
                "stage": action.stage,
                "kind": action.kind,
                "micro_batch": action.micro_batch,
                "start_seconds": start,
                "seconds": step.length(action),
            }
            if action.halves:
                one["backward"] = (action.halves[1].stage, action.halves[1].micro_batch)
            actions.append(one)
    spans = [step.pipeline_seconds] * len(step.actions)
    drawn = timeline_figure(SampledStep(1, plan.config.parallel.schedule, spans, actions))
    title = f"The pipeline in one step, as planned: who computes when ({plan.config.parallel.schedule_words})"
    return None if drawn is None else replace(drawn, title=title)
