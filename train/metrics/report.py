"""report.html: one file that shows a stranger how a run went. It needs no network and no server.

Everything is made from the run folder (metrics.jsonl, timeline.json, events.jsonl, config.yaml, checkpoints/), so the
report can be written again at any time, also beside a run that still trains or has crashed.
"""

import datetime
import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from plotly.offline import get_plotlyjs

from cluster.run_files import STEP_FOLDERS
from conf.files import atomic_write_text
from train.metrics.figures import build
from train.metrics.goodput import cluster_summary
from train.metrics.headline import Card, findings, headline
from train.metrics.jsonl import FILE
from train.metrics.names import EVENTS, SCALARS
from train.metrics.planned import Row, plan_rows
from train.metrics.plot import Figure
from train.metrics.progress import short
from train.metrics.series import POINTS, Series, read_series
from train.metrics.timeline import SampledStep, read_timeline

REPORT = "report.html"
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


def write_report(run_folder: Path) -> Path:
    """Write report.html into the run folder and return its path. An older report is replaced in one move."""
    settings_text = _read_text(run_folder / "config.yaml")
    settings = _settings(settings_text)
    series = read_series(run_folder / FILE)
    sampled = read_timeline(run_folder)
    name = str(settings.get("name") or run_folder.name)
    sections = _plan_parts(plan_rows(run_folder, series)) + _cluster_parts(cluster_summary(run_folder))
    page = _page(name, series, settings, settings_text, sections + _checkpoint_table(_checkpoints(run_folder)), sampled)
    path = run_folder / REPORT
    atomic_write_text(path, page)
    return path


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _settings(text: str) -> Mapping[str, Any]:
    try:
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that does not exist
        return {}  # the page shows the text as it is
    return settings if isinstance(settings, dict) else {}


def _checkpoints(run_folder: Path) -> list[tuple[str, str, str]]:
    """Name, size and time of every checkpoint, oldest first."""
    found = []
    for folder in (run_folder / "checkpoints").glob(STEP_FOLDERS):
        number = folder.name.removeprefix("step_")
        if number.isdecimal() and folder.is_dir():
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            when = datetime.datetime.fromtimestamp(folder.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
            found.append((int(number), folder.name, f"{short(size)}B", when))
    return [row[1:] for row in sorted(found)]


def _page(
    name: str,
    series: Series,
    settings: Mapping[str, Any],
    settings_text: str,
    sections: list[str],
    sampled: SampledStep | None,
) -> str:
    """sections: what stands below the figures."""
    written = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    parts = opening(f"Training report: {name}", f"{_description(settings)} Written {written}.")
    if len(series.step_N):
        parts += _run_parts(series, settings, sampled)
    else:
        parts.append("<p>No step has been recorded yet.</p>")
    parts += [
        *sections,
        "<h2>Configuration</h2><details><summary>Every setting of this run (config.yaml)</summary>",
        f"<pre>{html.escape(settings_text) or 'This folder has no config.yaml.'}</pre></details>",
        "<details><summary>What the names in metrics.jsonl mean</summary>",
        table(
            ("name", "unit", "meaning", "when"),
            [(m.name, m.unit, m.meaning, m.when or "always") for m in (*SCALARS, *EVENTS)],
        ),
        "</details></main></body></html>",
    ]
    return "\n".join(parts)


def opening(title: str, subtitle: str) -> list[str]:
    """The beginning of a page that needs no network; it ends with </main></body></html>."""
    return [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f'<meta http-equiv="Content-Security-Policy" content="{NO_NETWORK}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body><main>",
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="sub">{html.escape(subtitle)}</p>',
    ]


def _run_parts(series: Series, settings: Mapping[str, Any], sampled: SampledStep | None) -> list[str]:
    notes = "".join(f"<li>{html.escape(text)}</li>" for text in findings(series, settings))
    band = " A pale band runs from the lowest to the highest step of a stretch, the line is its mean."
    band = band if len(series.step_N) > POINTS else ""
    figures = "".join(figure_html(figure) for figure in build(series, settings, sampled))
    return [
        f'<h2>At a glance</h2><div class="cards">{cards_html(headline(series, settings))}</div>',
        f"<h2>Worth knowing</h2><ul>{notes}</ul>" if notes else "",
        f'<h2>Over the course of training</h2><p class="sub">{HOW_TO_READ}{band}</p>',
        f'<div class="figures">{figures}</div>',
    ]


def cards_html(cards: Iterable[Card]) -> str:
    """One box per figure."""
    return "".join(
        f'<div class="card">{html.escape(card.label)}<b>{html.escape(card.value)}</b><small>{html.escape(card.caption)}</small></div>'
        for card in cards
    )


def figure_html(figure: Figure) -> str:
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


def _plan_parts(rows: list[Row]) -> list[str]:
    """What mode=plan said beside what was measured."""
    if not rows:
        return []
    text = "Medians over the run, times as means over its ranks; the error is that of the plan."
    return [
        f'<h2>Planned and measured</h2><p class="sub">{text}</p>',
        table(("", "planned", "measured", "error"), rows),
    ]


def _cluster_parts(cluster: tuple[str, list] | None) -> list[str]:
    """What happened to the run on its machines."""
    if cluster is None:
        return []
    sentence, rows = cluster
    return [
        f'<h2>On the cluster</h2><p class="sub">{html.escape(sentence)}</p>',
        f"<details><summary>Events</summary>{table(('time', 'attempt', 'event', 'what happened'), rows)}</details>",
    ]


def _checkpoint_table(checkpoints: list[tuple[str, str, str]]) -> list[str]:
    if not checkpoints:
        return []
    return ["<h2>Checkpoints in this folder</h2>", table(("name", "size", "written"), checkpoints)]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<table><tr>{titles}</tr>{body}</table>"
