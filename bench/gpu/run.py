"""Runs a part to its end or to the end of its time, even if its processes die.

A dying process affects only one check: that line fails with the process's last output, and a new process continues with
the next check while there is time.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.gpu.child import read_entries
from bench.gpu.line import FAIL, NOT_TRIED, Line
from bench.gpu.words import last_words
from conf.schema import ROOT

POLL = 0.1
"""Seconds between two looks at what a child wrote."""
GRACE = 5.0
"""Seconds that the kernel may take to end a killed process; one that waits inside the driver is left behind."""


def run_part(name: str, device: str, seconds: float, show: Callable[[Line], None] = lambda line: None) -> list[Line]:
    """Every line of the part, in order. show: called with each as it is known."""
    command = [sys.executable, "-m", "bench.gpu.child", name, device]
    with TemporaryDirectory(prefix="sluice-gpu-") as folder:
        return follow(command, Path(folder), time.monotonic() + seconds, show)


def follow(command: list[str], folder: Path, deadline: float, show: Callable[[Line], None]) -> list[Line]:
    """Start the command, with a file for its lines as the last argument, again and again until no check is left."""
    written = WrittenResults(folder / "lines", show)
    while True:
        before = len(written.lines())
        code, stderr = _one_process([*command, str(written.path)], folder, deadline, written.lines)
        late = code is None
        why = "its part's time was over" if late else last_words(code, stderr)
        left = written.left()
        if not written.names():
            written.add(Line("start of the part", FAIL, why))
        elif left and written.begun() == left[0] and not late:
            written.add(Line(left.pop(0), FAIL, why))
        elif left and len(written.lines()) == before and not late:
            written.add(Line("process of the part", FAIL, why))
            late = True
        if late:  # a check that hangs fails by its own limit; one that was begun too late is no fault
            for name in left:
                was = ", and it was not done" if name == written.begun() else ""
                written.add(Line(name, NOT_TRIED, why + was))
        if not written.left():
            return written.lines()


class WrittenResults:
    """What the processes of a part wrote so far."""

    def __init__(self, path: Path, show: Callable[[Line], None]):
        self.path, self._show, self._shown = path, show, 0

    def names(self) -> list[str]:
        """Of all checks."""
        return next((entry["checks"] for entry in read_entries(self.path) if "checks" in entry), [])

    def begun(self) -> str | None:
        """The check that was begun last."""
        return next((entry["begun"] for entry in reversed(read_entries(self.path)) if "begun" in entry), None)

    def lines(self) -> list[Line]:
        """Shows those that are new."""
        lines = [Line(**entry["line"]) for entry in read_entries(self.path) if "line" in entry]
        for line in lines[self._shown :]:
            self._show(line)
        self._shown = len(lines)
        return lines

    def left(self) -> list[str]:
        """Checks without a line."""
        done = {line.name for line in self.lines()}
        return [name for name in self.names() if name not in done]

    def add(self, line: Line) -> None:
        with self.path.open("a") as file:
            # the first end of a line is that of what a process was writing when it died
            file.write("\n" + json.dumps({"line": asdict(line)}) + "\n")


def _one_process(command: list[str], folder: Path, deadline: float, look: Callable) -> tuple[int | None, str]:
    """Exit code (None: its time was over) and what it printed as errors. Nothing that it started outlives it."""
    errors = folder / "errors"
    with errors.open("wb") as stderr:
        child = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, start_new_session=True
        )
        try:
            while child.poll() is None and time.monotonic() < deadline:
                look()
                time.sleep(POLL)
            code = child.poll()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE)
    return code, errors.read_text(errors="replace")
