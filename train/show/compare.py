"""Compares several runs on one page: the settings that differ, the final results, and figures with a curve per run.

`mode=report name=SWEEP` compares the jobs of a sweep; `mode=report 'name=[a,b,c]'` compares any runs. The x axis is the
number of trained tokens.
"""

import html
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from rich.console import Console
from rich.table import Table

from conf.changed_settings import flat, settings_of
from conf.errors import EXIT_OK, UserError
from conf.files import atomic_write_text
from conf.schema import Config
from conf.screen import Terminal
from conf.words import say
from train.metrics.jsonl import METRICS_FILE
from train.metrics.names import SCALARS, Curve
from train.metrics.origin import ran_on_gpu
from train.metrics.quantities import short
from train.program import COMMAND
from train.show.headline import clipped
from train.show.plot import LINE_COLOURS, Figure, add_curve, log_axis, set_look
from train.show.report import read_settings, write_report
from train.show.report_page import HOW_TO_READ, closing, figure_html, opening, table_html
from train.show.screens import printable
from train.show.series import Series, last, median, read_series, tail_mean

COMPARISON_PAGE, OF_A_SWEEP = "comparison.html", "sweep.html"
WHERE_IT_LIES = ("name", "runs", "resume")
"""Settings that identify or locate a run."""
DASHES = ("solid", "dash", "dot", "dashdot")
UNITS = {metric.name: metric.unit for metric in SCALARS}
DRAWN = (
    ("validation_loss", "Held-out loss", "On text that was not trained on; lower is better."),
    (
        "main_loss",
        "Training loss, next token",
        "Compare it with the held-out loss: a much lower value means memorising.",
    ),
    ("tokens_per_second", "Speed", "Sum over all processes of a run; higher is better."),
    ("grad_norm", "Gradient norm before clipping", "Spikes are unstable steps."),
    ("max_vio_running", "Imbalance of the mean load", "MaxVio of the mean load of about 100 steps; 0 is even."),
    ("lr", "Learning rate", "From the schedules."),
)
"""For each figure: metric, title, and advice for the reader."""


@dataclass(frozen=True)
class RunToCompare:
    name: str
    settings: dict[str, Any]
    """All settings of the run, by dotted key."""
    series: Series
    gpu: bool
    """Whether the run trained on GPUs."""


def print_reports(config: Config) -> int:
    """Run mode=report and print the pages' paths. Returns the exit code."""
    for page in write_reports(config):
        say(page)
    return EXIT_OK


def write_reports(config: Config) -> list[Path]:
    """Write the report of one run, or the comparison of several runs. Returns the paths.

    Raises UserError if config.name is neither a run nor a sweep.
    """
    runs = Path(config.runs)
    names = names_of(config.name)
    if len(names) > 1:
        return [
            _write(runs / COMPARISON_PAGE, f"Comparison of {len(names)} runs", [_read(runs, name) for name in names])
        ]
    folder, jobs = runs / names[0], sweep_jobs(runs / names[0])
    pages = [write_report(folder)] if (folder / METRICS_FILE).exists() else []
    if jobs:
        compared = [_read(runs, f"{names[0]}/{job}") for job in jobs]
        pages.append(_write(folder / OF_A_SWEEP, f"Sweep: {names[0]}", compared))
    if not pages:
        raise _no_run(names[0], folder)
    return pages


def names_of(name: str) -> list[str]:
    """Returns the run names in the value of `name`, which is `a` or `[a,b]`."""
    return [one.strip() for one in name[1:-1].split(",")] if name.startswith("[") else [name]


def sweep_jobs(folder: Path) -> list[int]:
    """Returns the numbers of a sweep's jobs that have recorded steps."""
    found = (path.parent.name for path in folder.glob(f"*/{METRICS_FILE}"))
    return sorted(int(name) for name in found if name.isdecimal())


def _read(runs: Path, name: str) -> RunToCompare:
    folder = runs / name
    if not (folder / METRICS_FILE).exists():
        raise _no_run(name, folder)
    series = read_series(folder / METRICS_FILE)
    return RunToCompare(name, flat(dict(read_settings(folder))), series, ran_on_gpu(folder))


def _no_run(name: str, folder: Path) -> UserError:
    return UserError("name", name, f"needs the metrics of an existing run in {folder}", "train first, or give name=")


def _write(path: Path, title: str, runs: list[RunToCompare]) -> Path:
    differing = varied([run.settings for run in runs])
    figures = list(_figures(runs))
    rows = [(key, *(clipped(run.settings.get(key, "")) for run in runs)) for key in differing]
    parts = opening(
        title, "The x axis is the number of trained tokens, so runs with different batch sizes are comparable."
    )
    parts += ["<h2>What differs</h2>"]
    parts += [table_html(("setting", *(run.name for run in runs)), rows)] if rows else ["<p>No setting differs.</p>"]
    parts += [
        "<h2>How they ended</h2>",
        table_html(("", *(label for label, _ in COMPARED_RESULTS)), [(run.name, *_results(run, runs)) for run in runs]),
        f'<h2>Over the course of training</h2><p class="sub">{html.escape(HOW_TO_READ)}</p>',
        f'<div class="figures">{"".join(map(figure_html, figures))}</div>',
        *closing(figures),
    ]
    atomic_write_text(path, "\n".join(parts))
    return path


def varied(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the keys whose values differ, in the schema's order."""
    keys = dict.fromkeys(key for one in settings for key in one if key not in WHERE_IT_LIES)
    return [key for key in keys if any(one.get(key) != settings[0].get(key) for one in settings)]


COMPARED_RESULTS = (
    ("steps", lambda series: float(series.step_N[-1]) if len(series.step_N) else math.nan),
    ("tokens", lambda series: last(series, "tokens")),
    ("held-out loss", lambda series: last(series, "validation_loss")),
    ("bits per byte", lambda series: last(series, "validation_bits_per_byte")),
    ("training loss", lambda series: tail_mean(series.finite("main_loss"))),
    ("tokens/s", lambda series: median(series, "tokens_per_second")),
    ("MFU", lambda series: 100 * median(series, "mfu")),
    ("MaxVio", lambda series: last(series, "max_vio_running")),
    ("skipped steps", lambda series: last(series, "skipped_steps")),
)
RESULT_FORMATS = {
    "steps": ",.0f",
    "tokens": "short",
    "tokens/s": "short",
    "MFU": ".1f",
    "MaxVio": ".2f",
    "skipped steps": ".0f",
}


def _results(run: RunToCompare, runs: Sequence[RunToCompare]) -> Iterator[str]:
    """Yields a run's formatted results. The MFU of a CPU run is left out if another run used GPUs."""
    for label, measure in COMPARED_RESULTS:
        value, style = measure(run.series), RESULT_FORMATS.get(label, ".4f")
        if label == "MFU" and not run.gpu and any(other.gpu for other in runs):
            value = math.nan
        text = short(value) if style == "short" else f"{value:{style}}"
        yield text if math.isfinite(value) else ""


def _figures(runs: list[RunToCompare]) -> Iterator[Figure]:
    looks = cycle((colour, dash) for dash, colour in product(DASHES, LINE_COLOURS))
    looks = [next(looks) for _ in runs]
    for metric, title, caption in DRAWN:
        plot = go.Figure()
        for run, (colour, dash) in zip(runs, looks, strict=True):
            if run.series.has(metric):
                curve = Curve("", run.name, colour, 1.0, metric == "validation_loss", dash, metric != "lr")
                add_curve(plot, curve, _tokens(run.series), run.series.columns[metric])
        if plot.data:
            set_look(plot, 440 if metric == "validation_loss" else 360).update_xaxes(title="tokens")
            plot.update_yaxes(title=UNITS[metric], rangemode="tozero" if metric == "tokens_per_second" else "normal")
            if metric == "grad_norm":
                log_axis(plot)
            yield Figure(metric, title, caption, plot, metric == "validation_loss")


def _tokens(series: Series) -> np.ndarray:
    """Returns the number of trained tokens at every recorded step; the step numbers if no tokens are recorded."""
    return series.columns["tokens"] if series.has("tokens") else series.step_N


# At the end of a sweep the screen shows one table of its jobs.

WIDE = 200
"""Width, in characters, of a table that is written to a file. It is large enough that no cell wraps."""


def sweep_screen(configs: Sequence[Config], codes: Sequence[int], console: Console | None = None) -> None:
    """Prints a table of a sweep's jobs. codes: exit codes of the jobs, in order."""
    console = console or Terminal()
    settings = [flat(settings_of(config)) for config in configs]
    keys = varied(settings)
    table = Table("job", *keys, "held-out loss", "tokens/s", "exit code", box=None, header_style="dim")
    for number, (config, values) in enumerate(zip(configs, settings, strict=True)):
        code = str(codes[number]) if number < len(codes) else "not started"
        words = [_word(values.get(key)) for key in keys]
        table.add_row(
            *(printable(word, console.encoding) for word in (config.name, *words, *_job_results(config), code))
        )
    console.print()
    console.print(table, width=None if console.is_terminal else WIDE)
    sweep, runs = configs[0].name.rpartition("/")[0], configs[0].runs
    where = "" if runs == "runs" else f" runs={runs}"
    console.print(f"all curves in one figure: {COMMAND} mode=report name={sweep}{where}", soft_wrap=True)


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _job_results(config: Config) -> tuple[str, str]:
    """Returns a job's held-out loss and median speed, as texts."""
    path = Path(config.runs) / config.name / METRICS_FILE
    series = read_series(path)
    loss = f"{last(series, 'validation_loss'):.4f}" if series.has("validation_loss") else ""
    return loss, short(median(series, "tokens_per_second")) if series.has("tokens_per_second") else ""
