"""Shows a run on the driver's terminal: a status line below events and the output of rank 0.

Without a terminal, events and output are plain lines.
"""

import contextlib
import json
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from cluster.driver.messages import NodeHealth
from cluster.driver.supervisor import Supervisor
from cluster.run_files import NONE
from conf.files import read_tail
from conf.screen import Terminal
from conf.words import harmless

QUIET = {"checkpoint", "node_joined", "first_step", "finish"}
"""Kinds of events that are not printed."""
REFRESH = 0.5


class View:
    """Shows a supervisor's state. Use in `with`. metrics: path of metrics.jsonl."""

    def __init__(self, name: str, metrics: Path, steps: int, console: Console | None = None):
        self._console = console or Terminal()
        self._name, self._metrics, self._steps = name, metrics, steps
        self._live: Live | None = None
        self._last = ""
        self._line = b""
        self._refreshed = 0.0

    def __enter__(self) -> "View":
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._line:
            self._print(self._line.decode(errors="replace"))
            self._line = b""

    def note(self, kind: str, text: str) -> None:
        """Show an event."""
        text = harmless(text)
        self._last = f"{kind}: {text}".splitlines()[0]
        if kind not in QUIET:
            self._print(f"{time.strftime('%H:%M:%S')} {kind.replace('_', ' ')}: {text}")

    def output(self, piece: bytes) -> None:
        """Show new output of rank 0."""
        *lines, self._line = (self._line + piece).split(b"\n")
        for line in lines:
            self._print(line.decode(errors="replace"))

    def update(self, supervisor: Supervisor) -> None:
        """Redraw the status line if it is old enough."""
        now = time.monotonic()
        if self._live is not None and now - self._refreshed >= REFRESH:
            self._refreshed = now
            width = self._console.width
            text = status(self._name, self._steps, last_record(self._metrics), supervisor, self._last)
            self._live.update(Text("\n".join(line[:width] for line in text.splitlines())), refresh=True)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def status(name: str, steps: int, record: dict, supervisor: Supervisor, last: str) -> str:
    """Return two lines: the state of training and of machines."""
    parts = [name, f"step {record.get('step', 0)}/{steps}"]
    if record.get("main_loss") is not None:
        parts.append(f"loss {record['main_loss']:.4g}")
    if record.get("tokens_per_second"):
        parts.append(f"{record['tokens_per_second']:.4g} tokens/s")
    if supervisor.attempt is not None:
        placement = supervisor.attempt.placement
        parts.append(supervisor.policy.shapes.name(placement.shape))
        if placement.shape != supervisor.policy.shapes.own and placement.spares:
            parts.append(f"{len(placement.spares)} nodes idle")
    up = sum(state.health is NodeHealth.ok for state in supervisor.nodes.values())
    machines = [supervisor.phase.value, f"{up}/{len(supervisor.nodes)} nodes", f"attempt {supervisor.number}"]
    if supervisor.failures:
        machines.append(f"{len(supervisor.failures)} failures")
    if supervisor.saved > NONE:
        machines.append(f"saved step {supervisor.saved.step}")
    if supervisor.held > supervisor.saved:
        machines.append(f"in memory step {supervisor.held.step}")
    return "  ".join(parts) + "\n" + "  ".join([*machines, last])


def last_record(metrics: Path) -> dict:
    """Return the last complete record of metrics.jsonl, or nothing."""
    *lines, _ = read_tail(metrics, 256 << 10).split(b"\n")
    with contextlib.suppress(ValueError):  # skip an incomplete line
        return json.loads(lines[-1]) if lines else {}
    return {}
