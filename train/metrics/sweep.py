"""The end of a sweep: one table of its jobs."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from conf.changed_settings import flat, settings_of
from conf.schema import Config
from conf.screen import Terminal
from train.metrics.compare import varied
from train.metrics.jsonl import METRICS_FILE
from train.metrics.quantities import short
from train.metrics.screens import printable
from train.metrics.series import last, median, read_series

WIDE = 200
"""Columns of a table that goes to a file, where nothing has to be folded."""


def sweep_screen(configs: Sequence[Config], codes: Sequence[int], console: Console | None = None) -> None:
    """Job, what varied, held-out loss, speed and exit code, on stdout. codes: of the jobs that were started, in order."""
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
    console.print(f"curves over each other: python -m train mode=report name={sweep}{where}", soft_wrap=True)


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _job_results(config: Config) -> tuple[str, str]:
    """Held-out loss and median speed of a job; empty without a step."""
    path = Path(config.runs) / config.name / METRICS_FILE
    series = read_series(path)
    loss = f"{last(series, 'validation_loss'):.4f}" if series.has("validation_loss") else ""
    return loss, short(median(series, "tokens_per_second")) if series.has("tokens_per_second") else ""
