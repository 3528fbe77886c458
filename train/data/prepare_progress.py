"""Shows the progress of `prepare` on stderr: a bar in a terminal, or lines."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from conf.words import one_line, say

if TYPE_CHECKING:
    from rich.progress import Progress as ProgressBar
    from rich.progress import TaskID

ReportProgress = Callable[[str, int, int], None]
"""Called with the stage's name, the number of bytes done, and the total number of bytes."""


def silent(stage: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""


@contextmanager
def show_progress() -> Iterator[ReportProgress]:
    """Returns a context manager that gives a progress callback for `prepare`."""
    with ExitStack() as stack:
        yield _Bar(stack) if sys.stderr.isatty() else _Lines()


class _Lines:
    """Prints one line when a stage begins."""

    def __init__(self) -> None:
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stage = stage
            size = f" ({total / 1e6:.1f} MB)" if total else ""
            say(f"data: {one_line(stage)}{size}", file=sys.stderr, flush=True)


class _Bar:
    """A bar that shows one stage after another."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack, self._stage = stack, ""
        self._task: TaskID | None = None

    @cached_property
    def _progress(self) -> "ProgressBar":
        """Created on first use, because importing rich takes time."""
        from rich import progress

        from conf.screen import Terminal

        columns = (
            progress.TextColumn("data: {task.description}", markup=False),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TimeRemainingColumn(),
        )
        return self._stack.enter_context(progress.Progress(*columns, console=Terminal(stderr=True), transient=True))

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._task is None or stage != self._stage:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task, self._stage = self._progress.add_task(one_line(stage)), stage
        self._progress.update(self._task, completed=done, total=total or None)
