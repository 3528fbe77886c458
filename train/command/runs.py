"""`sluice runs [runs=FOLDER] [--json]`: lists the runs of a folder.
`sluice runs clean [NAME ...] [--yes]`: removes runs or checkpoints.

Without --yes, clean only shows the space that it would free. With names, it
removes these runs completely. Without names, it removes runs without any step,
and checkpoints of stopped and finished runs. It does not remove a run's newest
intact checkpoint, the checkpoints of checkpoint.keep_every, and the best
checkpoint (checkpoint.keep_best).
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from cluster.run_files import STEP_FOLDERS
from conf.disk import size_in_words
from conf.errors import EXIT_OK, UserError
from conf.files import read_plain
from conf.load import reported
from conf.screen import Terminal
from conf.words import say
from train.checkpoint.manifest import newest_intact
from train.checkpoint.run_folder import best_step, is_held
from train.command.command_words import sort_words
from train.metrics.jsonl import METRICS_FILE, read_last
from train.metrics.quantities import duration

LIST_RUNS = "`sluice runs` lists them; `sluice runs runs=FOLDER` lists the runs of another folder"


@dataclass(frozen=True)
class RunSummary:
    """Summary of a run folder."""

    name: str
    state: str
    """`trains now`, `done`, or:

    - `stopped`: the run can continue from a checkpoint
    - `lost`: the run has steps but no checkpoint
    - `empty`: the run has no steps
    """
    step: int
    steps: int | None
    """Number of planned steps; None if config.yaml does not have it."""
    loss: float | None
    """Next-token loss of the last step in nats per token, without MTP."""
    age_s: float
    """Seconds since the run last wrote a file."""
    disk_bytes: int


@reported
def main(words: Sequence[str]) -> int:
    """Run `sluice runs` with these arguments; returns the exit code."""
    given = sort_words("sluice runs", words)
    names, flags, folder = given.names, given.flags, given.runs
    cleans = names[:1] == ["clean"]
    given.require_flags({"--yes"} if cleans else {"--json"}, "`sluice runs --json`, `sluice runs clean --yes`")
    found = {run.name: run for run in summaries(folder)}
    if cleans:
        return _clean(folder, found, names[1:], "--yes" in flags)
    if names:
        raise UserError(given.command, names[0], "accepts only runs=FOLDER, --json and clean", LIST_RUNS)
    if "--json" in flags:
        say(json.dumps([asdict(run) for run in found.values()], indent=1))
        return EXIT_OK
    table = Table("run", "state", "step", "loss", "age", "disk", box=None, header_style="dim")
    for run in found.values():
        of = f" of {run.steps}" if run.steps else ""
        loss = "" if run.loss is None else f"{run.loss:.4f}"
        table.add_row(run.name, run.state, f"{run.step}{of}", loss, duration(run.age_s), size_in_words(run.disk_bytes))
    Terminal().print(table if found else f"no run in {folder.absolute()}")
    return EXIT_OK


def summaries(folder: Path) -> Iterator[RunSummary]:
    """Yields the runs in a folder, including jobs of sweeps, newest first."""
    configs = [*folder.glob("*/config.yaml"), *folder.glob("*/*/config.yaml")]
    runs = [_summary(folder, config.parent) for config in configs]
    yield from sorted(runs, key=lambda run: run.age_s)


def _summary(folder: Path, run: Path) -> RunSummary:
    steps = _setting(run, "steps")
    last = read_last(run / METRICS_FILE)
    step, saved = last.get("step", 0), any((run / "checkpoints").glob(STEP_FOLDERS))
    if is_held(run):
        state = "trains now"
    elif step and steps is not None and step >= steps and saved:
        state = "done"
    else:
        state = "stopped" if saved else "lost" if step else "empty"
    latest = max(
        path.lstat().st_mtime for path in (run, run / "config.yaml", *filter(Path.exists, [run / METRICS_FILE]))
    )
    known = steps if isinstance(steps, int) else None
    age = max(0.0, time.time() - latest)
    return RunSummary(
        run.relative_to(folder).as_posix(), state, step, known, last.get("main_loss"), age, disk_bytes(run)
    )


def _setting(run: Path, *keys: str) -> Any:
    """Returns a value in a run's config.yaml; None if unreadable."""
    try:
        value = yaml.safe_load(read_plain(run / "config.yaml"))
        for key in keys:
            value = value[key]
    except (OSError, ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError):
        return None
    return value


def disk_bytes(path: Path) -> int:
    """Returns the disk space of a folder, without following links."""
    total = 0
    for place, _, files in os.walk(path):
        for file in files:
            try:
                total += os.lstat(os.path.join(place, file)).st_blocks * 512
            except FileNotFoundError:  # the run removed a checkpoint in the meantime
                continue
    return total


def _clean(folder: Path, found: dict[str, RunSummary], names: Sequence[str], does: bool) -> int:
    for name in names:
        if name not in found:
            raise UserError("sluice runs clean", name, f"is no run in {folder.absolute()}", LIST_RUNS)
        if is_held(folder / name):
            raise UserError("sluice runs clean", name, "trains now", "stop the run first, with Ctrl-C or SIGTERM")
    going = [folder / name for name in names] if names else list(_superfluous(folder, found.values()))
    freed = 0
    for path in going:
        freed += (bytes_ := disk_bytes(path))
        say(f"{'removed' if does else 'would remove'} {path}: {size_in_words(bytes_)}")
        if does:
            _remove(path)
    say(f"{size_in_words(freed)} {'freed' if does else 'would be freed'}")
    if going and not does:
        say("nothing was removed; add --yes to remove it", file=sys.stderr)
    return EXIT_OK


def _remove(path: Path) -> None:
    """Rename a folder, then remove it: no reader finds it half removed."""
    gone = path.with_name(f".{path.name}.removed")
    path.rename(gone)
    shutil.rmtree(gone)


def _superfluous(folder: Path, runs: Iterable[RunSummary]) -> Iterator[Path]:
    """Yields folders whose removal loses no result."""
    for run in runs:
        path = folder / run.name
        if run.state == "empty":
            yield path
        elif run.state in ("stopped", "done") and not is_held(path):
            newest, every = (
                newest_intact(path / "checkpoints", full=True).path,
                _setting(path, "checkpoint", "keep_every"),
            )
            if newest is None or not isinstance(every, int):
                continue  # without these facts it is unknown which checkpoints must be kept
            best = best_step(path)
            for other in sorted((path / "checkpoints").glob(STEP_FOLDERS)):
                if (
                    other != newest
                    and int(other.name.removeprefix("step_")) != best
                    and not (every and int(other.name.removeprefix("step_")) % every == 0)
                ):
                    yield other
