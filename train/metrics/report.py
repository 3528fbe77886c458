"""report.html: one file that shows a stranger how a run went. It needs no network and no server.

Everything is made from the run folder (metrics.jsonl, config.yaml, checkpoints/), so the report can be written again at
any time, also beside a run that still trains or has crashed.
"""

import datetime
import html
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from plotly.offline import get_plotlyjs

from train.metrics.figures import POINTS, Figure, Series, build
from train.metrics.jsonl import FILE, read_heads_with_loads, read_steps
from train.metrics.names import SCALARS
from train.metrics.progress import duration, short

REPORT = "report.html"
HEAT_STEPS, HEAT_CELLS = 240, 600_000
"""Columns of a heat map, and cells of all heat maps of expert loads together, at most."""
HOW_TO_READ = "Drag over a figure to zoom, double-click to zoom out."
NO_NETWORK = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #f4f5f7; margin: 0; }
main { max-width: 1280px; margin: 0 auto; padding: 16px 24px 48px; }
h1 { margin: 16px 0 0; } h2 { margin: 32px 0 8px; } h3 { margin: 0; font-size: 18px; }
p { margin: 4px 0; } .sub { color: #555; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(225px, 1fr)); gap: 12px; }
.card, figure { background: #fff; border: 1px solid #dcdfe4; border-radius: 8px; padding: 12px 16px; }
.card b { display: block; font-size: 26px; line-height: 1.25; } .card small { color: #555; display: block; }
.figures { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; }
figure { margin: 0; min-width: 0; } figure.wide { grid-column: 1 / -1; } figcaption { color: #555; font-size: 14px; }
@media (max-width: 900px) { .figures { grid-template-columns: 1fr; } }
pre { background: #fff; border: 1px solid #dcdfe4; border-radius: 8px; padding: 12px; overflow: auto; font-size: 13px; }
table { border-collapse: collapse; background: #fff; } td, th { border: 1px solid #dcdfe4; padding: 4px 12px; text-align: left; }
summary { cursor: pointer; font-weight: 600; }
"""


class Card(NamedTuple):
    label: str
    value: str
    caption: str


def write_report(run_folder: Path) -> Path:
    """Write report.html into the run folder and return its path. An older report is replaced in one move."""
    settings_text = _read_text(run_folder / "config.yaml")
    settings = _settings(settings_text)
    series = read_series(run_folder / FILE)
    page = _page(
        str(settings.get("name") or run_folder.name), series, settings, settings_text, _checkpoints(run_folder)
    )
    path, part = run_folder / REPORT, run_folder / f"{REPORT}.part"
    part.write_text(page, encoding="utf-8")
    os.replace(part, path)
    return path


def read_series(path: Path) -> Series:
    """The scalars of every step, and layers and loads of evenly spaced steps. A missing file is a run without steps."""
    heads, loaded = [], []
    for head, has_loads in read_heads_with_loads(path) if path.exists() else ():
        heads.append(head)
        if has_loads:
            loaded.append(head["step"])
    names = dict.fromkeys(name for head in heads for name in head)
    columns = {name: np.array([_number(head.get(name)) for head in heads]) for name in names}
    step_N = np.array([head["step"] for head in heads], np.int64)
    return Series(step_N, columns, *_layers(path, loaded))


def _layers(path: Path, loaded: list[int]) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Layer names, steps_S, MaxVio_SL and load_SLE of as many of the steps as the page has room for."""
    if not loaded:
        return [], np.zeros(0), np.zeros((0, 0)), np.zeros((0, 0, 0))
    (first,) = read_steps(path, {loaded[0]})
    layers = list(first["load"])
    cells = sum(len(row) for row in first["load"].values())
    room = min(HEAT_STEPS, max(2, HEAT_CELLS // cells), len(loaded))
    wanted = {loaded[i] for i in np.linspace(0, len(loaded) - 1, room).round().astype(int)}
    lines = [line for line in read_steps(path, wanted) if list(line["load"]) == layers]
    vio_SL = np.array([[_number(line["layer_max_vio"].get(name)) for name in layers] for line in lines])
    load_SLE = np.array([[line["load"][name] for name in layers] for line in lines], np.float64)
    return layers, np.array([line["step"] for line in lines]), vio_SL, load_SLE


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _settings(text: str) -> Mapping[str, Any]:
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}  # the page shows the text as it is
    return settings if isinstance(settings, dict) else {}


def _checkpoints(run_folder: Path) -> list[tuple[str, str, str]]:
    """Name, size and time of every checkpoint, oldest first."""
    found = []
    for folder in (run_folder / "checkpoints").glob("step_*"):
        number = folder.name.removeprefix("step_")
        if number.isdecimal() and folder.is_dir():
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            when = datetime.datetime.fromtimestamp(folder.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
            found.append((int(number), folder.name, f"{short(size)}B", when))
    return [row[1:] for row in sorted(found)]


def headline(series: Series, settings: Mapping[str, Any]) -> list[Card]:
    """The numbers that one wants first, each with what would be good."""
    columns, model = series.columns, settings.get("model") or {}

    def last(name: str) -> float:
        values = columns.get(name, np.zeros(0))
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if len(finite) else math.nan

    def total(name: str) -> float:
        return float(np.nansum(columns.get(name, np.zeros(0))))

    def median(name: str) -> float:
        values = columns.get(name, np.zeros(0))
        values = values[len(values) // 10 :]  # the start warms up
        return float(np.nanmedian(values)) if np.isfinite(values).any() else math.nan

    vocabulary = model.get("vocab_size")
    chance = ""
    if isinstance(vocabulary, int) and vocabulary > 1:
        chance = f" Guessing among {vocabulary:,} tokens at random gives {math.log(vocabulary):.2f}."
    stalled = total("checkpoint_stall_seconds")
    seconds = total("step_seconds") + stalled
    waits = (total("data_wait_seconds") + stalled) / seconds if seconds > 0 else math.nan
    cards = [
        (
            last("validation_loss"),
            "Held-out loss",
            "{:.3f}",
            f"nats per token on text never trained on; lower is better.{chance}",
        ),
        (
            last("validation_bits_per_byte"),
            "Held-out bits per byte",
            "{:.3f}",
            "the same per byte of text, comparable across tokenizers; lower is better, random bytes give 8.",
        ),
        (
            _tail_mean(columns.get("main_loss", columns.get("loss", np.zeros(0)))),
            "Training loss at the end",
            "{:.3f}",
            "nats per token, mean of the last steps; close to the held-out loss is good, far below it is memorising.",
        ),
        (
            last("tokens"),
            "Tokens trained",
            short,
            f"in {_steps(int(series.step_N[-1]))}, {duration(seconds)} of training time.",
        ),
        (median("tokens_per_second"), "Tokens per second", short, "median over the run, all processes together."),
        (
            100 * median("mfu"),
            "Use of the hardware (MFU)",
            "{:.1f} %",
            "share of peak arithmetic that went into the model; DeepSeek-V3 reports 38.9 % on its H800s.",
        ),
        (
            last("max_vio_running"),
            "Imbalance of experts",
            "{:.2f}",
            "MaxVio over about 100 steps: 0 is even, 1 means the busiest expert got twice its share.",
        ),
        (last("dead_experts"), "Dead experts", "{:.0f}", "experts without a token in the last 20 steps; 0 is good."),
        (
            100 * waits,
            "Time spent waiting",
            "{:.1f} %",
            "of the training time, for data and for checkpoints; near 0 is good.",
        ),
        (
            _largest(columns.get("memory_bytes")),
            "Peak memory",
            lambda x: f"{x / 2**30:.2f} GiB",
            "of the process that reports: GPU memory on a GPU, else main memory.",
        ),
        (
            last("skipped_steps"),
            "Skipped steps",
            "{:.0f}",
            "updates left out for a non-finite loss or gradient; 0 is good.",
        ),
    ]
    return [
        Card(label, form(value) if callable(form) else form.format(value), caption)
        for value, label, form, caption in cards
        if math.isfinite(value)
    ]


def _steps(number: int) -> str:
    return f"{number:,} step" if number == 1 else f"{number:,} steps"


def _tail_mean(values_N: np.ndarray) -> float:
    tail = values_N[-max(1, min(20, len(values_N) // 10)) :]
    return float(np.nanmean(tail)) if np.isfinite(tail).any() else math.nan


def _largest(values_N: np.ndarray | None) -> float:
    return float(np.nanmax(values_N)) if values_N is not None and np.isfinite(values_N).any() else math.nan


def _findings(series: Series, settings: Mapping[str, Any]) -> list[str]:
    """Sentences on how it went and on what is out of the ordinary."""
    found = []
    main_N = series.columns.get("main_loss", np.zeros(0))
    main_N = main_N[np.isfinite(main_N)]
    if len(main_N) > 1:
        found.append(f"The training loss went from {main_N[0]:.3f} to {_tail_mean(main_N):.3f} nats per token.")
    planned = settings.get("steps")
    if isinstance(planned, int) and series.step_N[-1] < planned:
        found.append(
            f"The run has done {series.step_N[-1]:,} of {planned:,} steps: it still trains, or it was stopped."
        )
    loss_N = series.columns.get("loss", np.zeros(0))
    if len(loss_N) and (lost := int((~np.isfinite(loss_N)).sum())):
        found.append(
            f"The loss was not a finite number in {lost:,} of {len(loss_N):,} recorded steps: gaps in the curves."
        )
    held_N = series.columns.get("validation_loss", np.zeros(0))
    held_N = held_N[np.isfinite(held_N)]
    if len(held_N) > 2 and held_N[-1] > held_N.min() + 0.02:
        found.append(
            f"The held-out loss rose again from its best value {held_N.min():.3f} to {held_N[-1]:.3f}: the model memorises."
        )
    if _largest(series.columns.get("mfu")) > 1:
        found.append(
            "MFU above 100 % means that the peak it is measured against is too low: the machine was busy when the peak was "
            "measured. Set log.peak_flops to the true figure."
        )
    if not series.layers:
        found.append("No expert loads were recorded, so the figures on experts are left out.")
    return found


def _page(name: str, series: Series, settings: Mapping[str, Any], settings_text: str, checkpoints: list) -> str:
    written = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}: training report</title>',
        f'<meta http-equiv="Content-Security-Policy" content="{NO_NETWORK}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body><main>",
        f"<h1>Training report: {html.escape(name)}</h1>",
        f'<p class="sub">{html.escape(_description(settings))} Written {written}.</p>',
    ]
    if len(series.step_N):
        parts += _run_parts(series, settings)
    else:
        parts.append("<p>No step has been recorded yet.</p>")
    parts += _checkpoint_table(checkpoints)
    parts += [
        "<h2>Configuration</h2><details><summary>Every setting of this run (config.yaml)</summary>",
        f"<pre>{html.escape(settings_text) or 'This folder has no config.yaml.'}</pre></details>",
        "<details><summary>What the names in metrics.jsonl mean</summary>",
        _table(("name", "unit", "meaning"), [(metric.name, metric.unit, metric.meaning) for metric in SCALARS]),
        "</details></main></body></html>",
    ]
    return "\n".join(parts)


def _run_parts(series: Series, settings: Mapping[str, Any]) -> list[str]:
    cards = "".join(
        f'<div class="card">{html.escape(card.label)}<b>{html.escape(card.value)}</b><small>{html.escape(card.caption)}</small></div>'
        for card in headline(series, settings)
    )
    notes = "".join(f"<li>{html.escape(text)}</li>" for text in _findings(series, settings))
    band = " A pale band runs from the lowest to the highest step of a stretch, the line is its mean."
    band = band if len(series.step_N) > POINTS else ""
    figures = "".join(_figure_html(figure) for figure in build(series, settings))
    return [
        f'<h2>At a glance</h2><div class="cards">{cards}</div>',
        f"<h2>Worth knowing</h2><ul>{notes}</ul>" if notes else "",
        f'<h2>Over the course of training</h2><p class="sub">{HOW_TO_READ}{band}</p>',
        f'<div class="figures">{figures}</div>',
    ]


def _figure_html(figure: Figure) -> str:
    plot = figure.plot.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"plot-{figure.key}",
        config={"displayModeBar": False, "responsive": True},
    )
    wide = ' class="wide"' if figure.wide else ""
    return f"<figure{wide}><h3>{html.escape(figure.title)}</h3>{plot}<figcaption>{html.escape(figure.caption)}</figcaption></figure>"


def _description(settings: Mapping[str, Any]) -> str:
    """One sentence on the model and the data, from what the configuration has."""
    model, data = settings.get("model") or {}, settings.get("data") or {}
    if not {"layers", "hidden", "experts", "top_k"} <= model.keys():
        return ""
    source = data.get("path") or ("a mix of sources" if data.get("mix") else "Python's standard library")
    return (
        f"A DeepSeek-V3-style language model with {model['layers']} layers of width {model['hidden']}, "
        f"{model['experts']} experts per expert layer of which each token uses {model['top_k']}, trained on {source}."
    )


def _checkpoint_table(checkpoints: list[tuple[str, str, str]]) -> list[str]:
    if not checkpoints:
        return []
    return ["<h2>Checkpoints in this folder</h2>", _table(("name", "size", "written"), checkpoints)]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<table><tr>{titles}</tr>{body}</table>"
