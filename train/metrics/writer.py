"""Where the numbers of a step go: metrics.jsonl, the terminal, and Weights & Biases.

The trainer of the logging rank opens one MetricsWriter and hands it one flat record a step, with names as in
names.py. Sinks are independent; none of them stops the training.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from cluster.launch import given_attempt
from conf.schema import Config
from train.loop.changed_settings import settings_of
from train.metrics.goodput import GoodputRecord
from train.metrics.jsonl import FILE, JsonlSink
from train.metrics.names import Record
from train.metrics.planned import planned
from train.metrics.progress import Progress
from train.metrics.wandb_sink import WandbSink, wants_wandb


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
    ):
        """every: steps between records to the sinks; the first, the last and validated steps always go there.

        The terminal sees every record. first: events that the first record is to hold. extra: further scalars for the sinks.
        """
        self._sinks, self._progress, self._extra = list(sinks), progress, extra
        self._every, self._last_step, self._first = every, last_step, first or {}
        self._closed = False

    def write(self, record: Record) -> bool:
        """Record one step; needs at least `step`. Whether it went to the sinks."""
        self._progress.write(record)
        step = record["step"]
        due = (
            step % self._every == 0 or step in (1, self._last_step) or "validation_loss" in record or bool(self._first)
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

    @property
    def wandb_run(self) -> str | None:
        """Address or offline folder of the W&B run, for the last screen; None without one."""
        return next((sink.where for sink in self._sinks if isinstance(sink, WandbSink)), None)

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

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_writer(
    config: Config, run_folder: Path, *, resumed_step: int = 0, resumed: Record | None = None
) -> MetricsWriter:
    """The sinks that config.log asks for. resumed_step: last step in the loaded checkpoint, 0 for a new run.

    resumed: as in names.py, where it came from and what differs from the run that wrote it.
    """
    name = config.name or run_folder.name
    progress = Progress(name, config.steps, enabled=config.log.progress, done=resumed_step)
    sinks: list[Sink] = [JsonlSink(run_folder / FILE, resumed_step, progress.note)]
    if wants_wandb(config.log.wandb):
        sinks.append(
            WandbSink(
                run_folder,
                project=config.log.wandb_project,
                name=name,
                config=settings_of(config),
                mode=config.log.wandb,
                note=progress.note,
                group=name.rpartition("/")[0] or None,  # a sweep's jobs are NAME/0, NAME/1 and so on
            )
        )
    cluster = dict if given_attempt() is None else GoodputRecord(run_folder)
    plan = planned(config, run_folder)
    return MetricsWriter(
        sinks,
        progress,
        every=config.log.every,
        last_step=config.steps,
        first=None if resumed is None else {"resumed": resumed},
        extra=lambda: plan | cluster(),
    )
