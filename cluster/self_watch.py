"""A rank that no driver of ours watches, under torchrun or alone in its process, sees by itself that it hangs."""

import faulthandler
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

from cluster.cause import innermost, read_report, waits_for_ranks
from cluster.clocks import HeldUp
from cluster.patience import Patience
from cluster.rank_watch import RankWatch
from cluster.run_files import progress_path
from cluster.spawn import waited_for_core
from conf.errors import EXIT_CRASH
from conf.words import say

LOOK_SECONDS = 0.25
"""Between two looks."""


class SelfWatch:
    """Use it in `with`, around the work of this process. Says where the rank is when it gets on no more; ends: and ends it, so that what
    started the ranks ends or restarts them all. It does not where the process is somebody else's, as a notebook.
    """

    def __init__(self, logs: Path, rank: int, patience: Patience, ends: bool):
        self._logs, self._rank, self._ends = logs, rank, ends
        self._watch = RankWatch([rank], {}, patience, time.monotonic())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch of this rank", daemon=True)

    def __enter__(self) -> "SelfWatch":
        progress_path(self._logs, self._rank).unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        held_up, told_at = HeldUp(2 * LOOK_SECONDS, time.monotonic()), None
        while not self._stop.wait(LOOK_SECONDS):
            now = time.monotonic()
            self._watch.forgive(now, held_up.since_last_look(now))
            report = read_report(self._rank, None, self._logs)
            report.waited_for_core = waited_for_core(os.getpid())
            self._watch.take(now, [report])
            if self._watch.first_step is None:
                continue
            if self._watch.is_hung(now) and told_at != self._watch.moved:
                told_at = self._watch.moved
                self._tell(now - told_at)
            elif text := self._watch.tell_quiet(now):
                say(text, file=sys.stderr)

    def _tell(self, seconds: float) -> None:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stack = file.read()
        what = "waits for other ranks" if waits_for_ranks(stack) else "is not in a collective"
        say(f"{stack}error: no step finished for {seconds:.0f} s: rank {self._rank} in step {self._watch.step} {what}{innermost(stack)}",
            file=sys.stderr)  # fmt: skip
        if self._ends:
            sys.stderr.flush()
            os._exit(EXIT_CRASH)
