"""report.html while a run trains: written now and then by a process of its own, at a low priority, so that no step waits for it.

Writing costs that process some seconds of a core. It starts no sooner than ten times as long after the one before.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from train.metrics.names import Record

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
            command = [sys.executable, "-m", "train.metrics.report_sink", str(self._folder)]
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


if __name__ == "__main__":
    os.nice(10)  # at 19 it would hardly get a turn beside ranks that use all cores
    from train.metrics.report import write_report  # here, as it brings plotly, which a rank does not need

    write_report(Path(sys.argv[1]))
