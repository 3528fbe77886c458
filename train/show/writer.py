"""Where the numbers of a step go: metrics.jsonl, the terminal, and Weights & Biases.

The trainer of the logging rank opens one MetricsWriter and hands it one flat record a step, with names as in
train/metrics/names.py. Sinks are independent; none of them stops the training.
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
from train.show.prometheus import PrometheusSink
from train.show.screens import Progress
from train.show.wandb_sink import Item, WandbSink, alert, wants_wandb

# report.html while a run trains: written now and then by a process of its own, at a low priority, so that no step waits for it.
#
# Writing costs that process some seconds of a core. It starts no sooner than ten times as long after the one before.

REPORT_EVERY = 300.0
"""Seconds between writings of the page while the run trains, by a process of its own at a low priority."""
FIRST_REPORT = 60.0
"""Seconds after the first step."""
IDLE_TIMES = 10.0
"""How much longer than a writing took the pause behind it is, at least."""


class ReportSink:
    """Has the report written while records come. Wait for its end, or have it ended, by `close`."""

    def __init__(self, run_folder: Path, every: float = REPORT_EVERY):
        """every: seconds between two, at least."""
        self._folder, self._every = run_folder, every
        self._child: subprocess.Popen | None = None
        self._began = time.monotonic()
        self._next = self._began + min(FIRST_REPORT, every)

    def write(self, record: Record) -> None:
        """Start another writing if it is time. What it costs beyond that is not this process's."""
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
        """No older report is written over the last one after this."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None
            for begun in self._folder.glob(".report.html.*.tmp"):
                begun.unlink()


SELDOM = {"validation_loss", "weight_norm"}
"""What is measured in few steps, and recorded in each of them."""


class Sink(Protocol):
    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Hands records to sinks; use as a context manager, so that an exception leaves a readable terminal."""

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
        """every: steps between records to the sinks; the first, the last and those with one of SELDOM always go there.

        The terminal sees every record. first: events that the first record is to hold. extra: further scalars for the sinks.
        alerts: the name that begins the title of an alert of W&B; None sends none.
        """
        self._sinks, self._progress, self._extra = list(sinks), progress, extra
        self._every, self._last_step, self._first = every, last_step, first or {}
        self._wandb = next((sink for sink in self._sinks if isinstance(sink, WandbSink)), None)
        self._alerts, self._closed = alerts, False

    def write(self, record: Record) -> bool:
        """Record one step; needs at least `step`. Whether it went to the sinks."""
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
        """What the run is busy with beside steps (`validation`, `checkpoint`), None when it is over."""
        self._progress.event(text)

    def note(self, text: str) -> None:
        """A sentence for the person at the terminal."""
        self._progress.note(text)

    def show(self, item: Item) -> None:
        """Something beside steps for W&B, as an Item is."""
        if self._wandb is not None:
            self._wandb.write(item)

    def alert(self, what: str, text: str) -> None:
        """Let W&B write to whoever watches the run. what: ends the title, as `diverged`."""
        if self._alerts is not None:
            self.show(alert(f"{self._alerts}: {what}", text))

    @property
    def wandb_run(self) -> str | None:
        """Address or offline folder of the W&B run, for the last screen; None without one."""
        return self._wandb.where if self._wandb is not None else None

    def close(self) -> None:
        """Finish every sink; may wait for W&B. Calling it again does nothing."""
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
    """A run, in two words."""
    from parallel.exchange import is_timeout  # imports torch, which the driver, who has no such error, does without

    if getattr(error, "code", None) == EXIT_DIVERGED:
        return "diverged"
    if isinstance(error, DiskFailed):
        return "a disk refused the run"
    if is_timeout(error):
        return "a rank stalled"
    return "crashed"


def open_writer(
    config: Config, run_folder: Path, *, resumed_step: int = 0, resumed: Record | None = None
) -> MetricsWriter:
    """The sinks that config.log asks for. resumed_step: last step in the loaded checkpoint, 0 for a new run.

    resumed: as in train/metrics/names.py, where it came from and what differs from the run that wrote it.
    """
    name = config.name or run_folder.name
    progress = Progress(name, config.steps, enabled=config.log.progress, done=resumed_step)

    def disk_note(text: str) -> None:
        progress.note(text)
        writer.alert("a disk refused metrics", text)

    resumed = _with_steps_again(run_folder / METRICS_FILE, resumed_step, resumed)
    sinks: list[Sink] = [JsonlSink(run_folder / METRICS_FILE, resumed_step, disk_note)]
    sinks.append(ReportSink(run_folder))
    if config.log.prometheus:
        sinks.append(PrometheusSink(config.log.prometheus, name))
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
    """`resumed`, with the steps that the file has behind the resumed one, which are done again, and the time of the last of them."""
    last = read_last(metrics)
    again = last.get("step", 0) - resumed_step
    if again <= 0:
        return resumed
    return (resumed or {"step": 0, "from": "the beginning"}) | {"again": again, "until": last.get("time")}


def open_wandb(
    config: Config, run_folder: Path, note: Callable[[str], None], settings: Mapping[str, Any] | None = None
) -> WandbSink:
    """The W&B run of a run folder. note: for a sentence to the person at the terminal. settings: to be shown with the run."""
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
    """Alert of a run that has failed for good, where its rank 0, which sends the other alerts, is gone: on a cluster, or ended as it hung."""
    text = last_failure(run_folder) if config.cluster.backend == "ray" else _hang_of(run_folder)
    if text and wants_wandb(config.log.wandb) and (run_folder / "wandb" / "run_id").is_file():
        sink = open_wandb(config, run_folder, lambda text: say(text, file=sys.stderr))
        sink.write(alert(f"{config.name}: ended with exit code {code}", text))
        sink.close()


def _hang_of(run_folder: Path) -> str:
    """The sentence on what held up the newest start; empty where it did not end for that."""
    _, incident = newest_incident(run_folder / "logs") or (None, {})
    begun = next((start["time"] for start in reversed(read_starts(run_folder))), 0.0)
    return incident["text"] if incident.get("kind") == Kind.hang.value and incident["time"] >= begun else ""
