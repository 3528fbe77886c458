"""Slow operations that a callback of the recipe puts into the ranks of a healthy run; see bench/slow_runs.py."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

DRIVER_FILE = "driver.pid"
"""File in the run folder with the process that is asked to stop the run."""
SLOW_AT = 8
"""The slow step. It follows some fast steps, and four steps follow it."""


class Slowpoke:
    """The callback. what: a key of `WAYS`. seconds: duration of the slow operation. ranks: the slow ranks; empty: all.
    every: seconds between two reports of progress; 0: no report during the operation.
    """

    def __init__(self, what: str, seconds: float, ranks: list[int], every: float):
        self._what, self._rank = what, int(os.environ.get("RANK", "-1"))  # -1: the process that checks the recipe
        self._seconds, self._every = seconds, every
        self._step = 0
        if self._rank >= 0 and (not ranks or self._rank in ranks) and what in WAYS:
            WAYS[what](self)

    def on_step(self, run: Any, step: int, record: dict) -> None:
        self._step = step
        if self._what == "on_step" and step == SLOW_AT:
            self.pause(run.got_on)
        if self._what == "stop" and step == SLOW_AT and run.rank == 0:
            os.kill(int((run.folder / DRIVER_FILE).read_text()), signal.SIGTERM)

    def on_checkpoint(self, run: Any, step: int, path: Any) -> None:
        if self._what == "on_checkpoint" and step == SLOW_AT and run.rank == 0:
            self.pause(run.got_on)

    def on_end(self, run: Any, code: int) -> None:
        if self._what == "on_end":
            self.pause(run.got_on)

    def pause(self, got_on: Callable[[], None]) -> None:
        """Wait for the duration, with or without reports of progress."""
        ends = time.monotonic() + self._seconds
        while (left := ends - time.monotonic()) > 0:
            time.sleep(min(left, self._every or left))
            if self._every:
                got_on()

    def slow_down(self, owner: Any, name: str, is_due: Callable[..., bool], got_on: Callable[[], None]) -> None:
        """Make this function of a module or class slow, once, when `is_due` says so."""
        original, waiting = getattr(owner, name), [True]

        def slow(*given: Any, **named: Any) -> Any:
            if waiting and is_due(*given, **named):
                waiting.clear()
                self.pause(got_on)
            return original(*given, **named)

        setattr(owner, name, slow)

    @property
    def is_late_in_run(self) -> bool:
        """Whether the next step is the slow step or a later one."""
        return self._step >= SLOW_AT - 1

    def stagger(self) -> None:
        """Ranks are slow for different times; the last rank for the whole duration."""
        self._seconds *= (self._rank + 1) / int(os.environ["WORLD_SIZE"])


def _silent() -> None:
    pass


def _loader(slow: Slowpoke) -> None:
    from train.data.prefetch import Prefetch

    slow.slow_down(Prefetch, "_make_next", lambda *_: slow.is_late_in_run, _silent)


def _step(slow: Slowpoke) -> None:
    from train.loop.training_engine import Engine

    slow.slow_down(Engine, "run", lambda *_, **__: slow.is_late_in_run, _got_on())


def _first_step(slow: Slowpoke) -> None:
    from train.loop.training_engine import Engine

    slow.stagger()
    slow.slow_down(Engine, "run", lambda *_, **__: True, _got_on())


def _validation(slow: Slowpoke) -> None:
    from train.loop.hooks import held_out_metrics

    slow.slow_down(held_out_metrics, "held_out_loss", lambda *_: slow.is_late_in_run, _got_on())


def _first_validation(slow: Slowpoke) -> None:
    from train.loop.hooks import held_out_metrics

    slow.slow_down(held_out_metrics, "held_out_loss", lambda *_: True, _got_on())


def _save(slow: Slowpoke) -> None:
    """A save in the middle of the run. It runs beside the steps until the next save is due."""
    _writes(slow, SLOW_AT)


def _last_save(slow: Slowpoke) -> None:
    _writes(slow, SLOW_AT + 4)


def _stop(slow: Slowpoke) -> None:
    """The save after SIGTERM."""
    _writes(slow, SLOW_AT + 1)


def _first_save(slow: Slowpoke) -> None:
    _writes(slow, 0)


def _writes(slow: Slowpoke, step: int) -> None:
    """The disk is slow: bytes are written in small parts, or one sync takes the whole time."""
    from cluster.comm_ring import wrote
    from train.checkpoint.staging import StagingBuffers

    def is_due(buffers: Any, folder: Any, rank: int) -> bool:
        return int(folder.name.split("_")[1].split(".")[0]) >= step

    slow.slow_down(StagingBuffers, "write", is_due, lambda: wrote(1))


def _commit(slow: Slowpoke) -> None:
    """The rename of the last checkpoint's folder is slow, as with a busy metadata server."""
    from train.checkpoint.commit import Committer

    slow.slow_down(Committer, "commit", lambda _, save, *__: save.step >= SLOW_AT + 4, _silent)


def _sample(slow: Slowpoke) -> None:
    from train.generate.generation import Generation

    slow.slow_down(Generation, "_prefill", lambda *_: slow.is_late_in_run, _got_on())


def _publish(slow: Slowpoke) -> None:
    from train.export import run

    slow.slow_down(run, "_write_weights", lambda *_: slow.is_late_in_run, _got_on())


def _report(slow: Slowpoke) -> None:
    """The work of rank 0 after the training is slow."""
    from train.loop import finish

    slow.slow_down(finish, "_report", lambda *_: True, _silent)


def _got_on() -> Callable[[], None]:
    from cluster.comm_ring import got_on

    return got_on


WAYS: dict[str, Callable[[Slowpoke], None]] = {
    "loader": _loader,
    "step": _step,
    "first_step": _first_step,
    "validation": _validation,
    "first_validation": _first_validation,
    "save": _save,
    "first_save": _first_save,
    "last_save": _last_save,
    "stop": _stop,
    "commit": _commit,
    "sample": _sample,
    "publish": _publish,
    "report": _report,
}
"""The operations in which a rank can be slow, in addition to the hooks of the callback itself."""
