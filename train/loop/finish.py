"""Ends a run for its user: writes the report, and shows results."""

import sys
from pathlib import Path

from cluster.run_files import stop_path
from conf.disk import explain_disk_error
from conf.errors import EXIT_OK, EXIT_STOPPED, UserError, first_line
from conf.files import read_plain
from conf.run_paths import RunPaths
from conf.schema import Config
from conf.words import say
from train.checkpoint.manifest import newest_intact, read_manifest
from train.metrics.jsonl import read_heads
from train.metrics.origin import command_to_go_on
from train.program import COMMAND
from train.show.planned import plan_rows, plan_words
from train.show.report import write_report
from train.show.screens import final_screen, stopped_screen
from train.show.series import Series, read_series, tail_mean


def finish_run(config: Config, code: int, seconds: float, wandb: str | None, text: str | None) -> None:
    """Shows the results of an ended run. seconds: wall time of the training."""
    paths = RunPaths(config)
    checkpoint = newest_intact(paths.checkpoints).path
    report = _report(config, paths.path)
    if code == EXIT_STOPPED:
        step = read_manifest(checkpoint).step if checkpoint else 0
        again = command_to_go_on(paths.path)
        stopped_screen(config.name, step, config.steps, _why_stopped(paths.logs), checkpoint=checkpoint, command=again)
    elif code == EXIT_OK:
        last, series = last_validation(paths.metrics), read_series(paths.metrics)
        final_screen(
            config.name,
            config.steps,
            seconds=seconds,
            training_loss=tail_mean(series.finite("main_loss")),
            validation_loss=last.get("validation_loss"),
            bits_per_byte=last.get("validation_bits_per_byte"),
            plan=_plan_line(paths.path, series),
            sample=text,
            checkpoint=checkpoint,
            report=report,
            wandb=wandb,
        )


def _why_stopped(logs: Path) -> str:
    why = stop_path(logs)
    return (read_plain(why).decode() if why.exists() else "") or "a signal requested it"


def _plan_line(folder: Path, series: Series) -> str | None:
    """Returns a line that compares plan and measurements, or None."""
    try:
        return plan_words(plan_rows(folder, series))
    except Exception as error:
        say(f"the plan of this run could not be computed: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
        return None


def _report(config: Config, folder: Path) -> Path | str:
    """Writes the report. Returns its path, or why it failed."""
    try:
        return write_report(folder, ended=True)
    except OSError as error:
        why = explain_disk_error(error)
    except UserError as error:  # a file of the run folder is damaged
        why = f"{error.value} {error.rule}"
    return f"not written ({why}); later: {COMMAND} mode=report name={config.name} runs={config.runs}"


def last_validation(metrics: Path) -> dict[str, float]:
    """Returns the newest record with a validation loss; may be empty."""
    found: dict[str, float] = {}
    for record in read_heads(metrics):
        if "validation_loss" in record:
            found = record
    return found
