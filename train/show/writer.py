"""Writes the metrics of each step to metrics.jsonl, to the terminal, and to Weights & Biases.

The logging rank passes a MetricsWriter one flat record per step. An error in a sink, such as metrics.jsonl, does not
stop the training.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cluster.cause import Kind
from cluster.incident import newest_incident
from cluster.place import given_attempt
from conf.changed_settings import settings_of
from conf.errors import EXIT_DIVERGED, DiskFailed
from conf.schema import Config
from conf.words import say
from train.metrics.jsonl import METRICS_FILE, JsonlSink, read_last
from train.metrics.names import Record
from train.metrics.origin import read_starts
from train.metrics.wall_time import GoodputRecord, last_failure
from train.show.planned import planned
from train.show.screens import Progress
from train.show.wandb_sink import Item, WandbSink, alert, wants_wandb

# While a run trains, a separate low-priority process writes report.html. It uses a core for some seconds. The next one
# starts after a pause of at least IDLE_TIMES times its duration.

REPORT_EVERY = 300.0
"""Minimum seconds between the starts of two report processes."""
FIRST_REPORT = 60.0
"""Seconds from the run's start to the first report process."""
IDLE_TIMES = 10.0
"""Minimum pause after a report process, relative to its duration."""


class ReportSink:
    """Sink that regularly starts a process which writes report.html."""

    def __init__(self, run_folder: Path, every: float = REPORT_EVERY):
        """every: minimum seconds between the starts of two report processes."""
        self._folder, self._every = run_folder, every
        self._child: subprocess.Popen | None = None
        self._began = time.monotonic()
        self._next = self._began + min(FIRST_REPORT, every)

    def write(self, record: Record) -> None:
        """Start a report process if one is due. Does not wait."""
        now = time.monotonic()
        if self._child is not None and self._child.poll() is not None:
            self._child = None
            self._next = max(self._began + self._every, now + IDLE_TIMES * (now - self._began))
        if self._child is None and now >= self._next:
            command = [sys.executable, "-m", "train.show.report", str(self._folder)]
            quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            self._child = subprocess.Popen(command, **quiet)
            self._began = now

    def close(self) -> None:
        """End a running report process, which could replace the final report."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None
            for begun in self._folder.glob(".report.html.*.tmp"):
                begun.unlink()


SELDOM = {"validation_loss", "weight_norm"}
"""Metrics that only some steps measure. The sinks get the record of every step that has one of these metrics."""


class Sink(Protocol):
    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Passes records to the terminal and to sinks, and closes them."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        progress: Progress,
        *,
        every: int = 1,
        last_step: int = 0,
        first: Record | None = None,
        extra: Callable[[], Record] = dict,
        alerts: str | None = None,
    ):
        """Opens the writer. The terminal gets every record; the sinks get only some.

        - every: interval, in steps, of the sinks' records. They also get the first and last step, and steps with a
          metric in SELDOM.
        - first: events to add to the first record.
        - extra: returns further scalars for the sinks.
        - alerts: beginning of the titles of W&B alerts; None: no alerts.
        """
        self._sinks, self._progress, self._extra = list(sinks), progress, extra
        self._every, self._last_step, self._first = every, last_step, first or {}
        self._wandb = next((sink for sink in self._sinks if isinstance(sink, WandbSink)), None)
        self._alerts, self._closed = alerts, False

    def write(self, record: Record) -> bool:
        """Record one step. Returns whether the sinks got it."""
        self._progress.write(record)
        step = record["step"]
        due = (
            step % self._every == 0 or step in (1, self._last_step) or bool(self._first) or bool(SELDOM & record.keys())
        )
        if due:
            record = record | self._first | self._extra()
            self._first = {}
            for sink in self._sinks:
                sink.write(record)
        return due

    def event(self, text: str | None) -> None:
        """Shows an activity that is not a step; None when it ended."""
        self._progress.event(text)

    def note(self, text: str) -> None:
        """Prints a sentence at the terminal."""
        self._progress.note(text)

    def show(self, item: Item) -> None:
        """Sends a checkpoint, table or alert to W&B, if the run uses W&B."""
        if self._wandb is not None:
            self._wandb.write(item)

    def alert(self, what: str, text: str) -> None:
        """Send a W&B alert. what: end of its title."""
        if self._alerts is not None:
            self.show(alert(f"{self._alerts}: {what}", text))

    @property
    def wandb_run(self) -> str | None:
        """Address or offline folder of the W&B run; None without W&B."""
        return self._wandb.where if self._wandb is not None else None

    def close(self) -> None:
        """Close every sink. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for sink in self._sinks:
            sink.close()
        self._progress.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, Exception):
            self.alert(what_ended(error), str(error))
        self.close()


def what_ended(error: BaseException) -> str:
    """Returns a short phrase about an error, for an alert's title."""
    from parallel.exchange import (
        is_timeout,
    )  # imported here, because it imports torch, which the driver does not need

    if getattr(error, "code", None) == EXIT_DIVERGED:
        return "diverged"
    if isinstance(error, DiskFailed):
        return "a file of the run could not be written"
    if is_timeout(error):
        return "a rank made no progress"
    return "crashed"


def open_writer(
    config: Config, run_folder: Path, *, resumed_step: int = 0, resumed: Record | None = None
) -> MetricsWriter:
    """Opens a writer with the sinks that config.log selects.

    - resumed_step: step of the loaded checkpoint; 0 for a new run.
    - resumed: the event `resumed` of train/metrics/names.py; None for a new run.
    """
    name = config.name or run_folder.name
    progress = Progress(name, config.steps, enabled=config.log.progress, done=resumed_step)

    def disk_note(text: str) -> None:
        progress.note(text)
        writer.alert("metrics could not be written", text)

    resumed = _with_steps_again(run_folder / METRICS_FILE, resumed_step, resumed)
    sinks: list[Sink] = [JsonlSink(run_folder / METRICS_FILE, resumed_step, disk_note)]
    sinks.append(ReportSink(run_folder))
    if wants_wandb(config.log.wandb):
        code = {name: start[name] for start in read_starts(run_folder)[-1:] for name in ("commit", "modified")}
        sinks.append(open_wandb(config, run_folder, progress.note, settings_of(config) | {"code": code}))
    attempt = given_attempt()
    cluster = dict if attempt is None else GoodputRecord(run_folder, lambda *told: writer.alert(*told))
    plan = planned(config, run_folder)
    writer = MetricsWriter(
        sinks,
        progress,
        every=config.log.every,
        last_step=config.steps,
        first=None if resumed is None else {"resumed": resumed},
        extra=lambda: plan | cluster(),
        alerts=name,
    )
    if attempt is not None and attempt > 1:
        writer.alert(f"restarted, attempt {attempt}", f"From step {resumed_step:,}. {last_failure(run_folder)}")
    return writer


def _with_steps_again(metrics: Path, resumed_step: int, resumed: Record | None) -> Record | None:
    """Returns the event `resumed`, with the number of repeated steps, if any."""
    last = read_last(metrics)
    again = last.get("step", 0) - resumed_step
    if again <= 0:
        return resumed
    return (resumed or {"step": 0, "from": "the beginning"}) | {"again": again, "until": last.get("time")}


def open_wandb(
    config: Config, run_folder: Path, note: Callable[[str], None], settings: Mapping[str, Any] | None = None
) -> WandbSink:
    """Opens a run folder's W&B run. note: prints a sentence."""
    starts = read_starts(run_folder)
    name = config.name or run_folder.name
    return WandbSink(
        run_folder,
        name=name,
        config=settings or {},
        mode=config.log.wandb,
        note=note,
        group=name.rpartition("/")[0] or None,  # a sweep's jobs are NAME/0, NAME/1 and so on
        commit=starts[-1]["commit"] if starts else None,
    )


def tell_of_end(config: Config, run_folder: Path, code: int) -> None:
    """Send a W&B alert about a failed run, if rank 0 cannot send it."""
    text = last_failure(run_folder) if config.cluster.backend == "ray" else _hang_of(run_folder)
    if text and wants_wandb(config.log.wandb) and (run_folder / "wandb" / "run_id").is_file():
        sink = open_wandb(config, run_folder, lambda text: say(text, file=sys.stderr))
        sink.write(alert(f"{config.name}: ended with exit code {code}", text))
        sink.close()


def _hang_of(run_folder: Path) -> str:
    """Returns a sentence about the hang of the run's newest start; empty if it did not hang."""
    _, incident = newest_incident(run_folder / "logs") or (None, {})
    begun = next((start["time"] for start in reversed(read_starts(run_folder))), 0.0)
    return incident["text"] if incident.get("kind") == Kind.hang.value and incident["time"] >= begun else ""
