"""A check and its result: a line that passes, fails, or was not tried, with the reason."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from bench.gpu.words import reason_of

PASS, FAIL, NOT_TRIED = "pass", "fail", "not tried"
LineFigure = float | int | str | None


class NotTried(Exception):
    """A check that cannot be made here; its text says why."""


@dataclass
class Finding:
    """What a check found; without a problem it passes."""

    figures: dict[str, LineFigure] = field(default_factory=dict)
    """By name, with the unit in it."""
    bound: str = ""
    """What must hold and why; empty where nothing is demanded of the figures."""
    problem: str | None = None
    """How the bound is broken."""
    table: list[list[LineFigure]] = field(default_factory=list)
    """More figures, the headings first."""


@dataclass(frozen=True)
class Check:
    """One line of the page, before it is known."""

    name: str
    run: Callable[[], Finding]
    limit: float = 60.0
    """Seconds, after which it has hung and its process ends."""


@dataclass
class Line:
    """One line of the page."""

    name: str
    verdict: str
    reason: str = ""
    """Why it failed or was not tried."""
    bound: str = ""
    figures: dict[str, LineFigure] = field(default_factory=dict)
    table: list[list[LineFigure]] = field(default_factory=list)
    seconds: float = 0.0


def make_line(check: Check) -> Line:
    """Run a check; whatever it raises becomes the reason of its line."""
    began = time.monotonic()
    try:
        found = check.run()
        verdict = PASS if found.problem is None else FAIL
        line = Line(check.name, verdict, found.problem or "", found.bound, found.figures, found.table)
    except NotTried as reason:
        line = Line(check.name, NOT_TRIED, str(reason))
    except Exception as error:
        line = Line(check.name, FAIL, reason_of(error))
    line.figures = {name: _writable(value) for name, value in line.figures.items()}
    line.table = [[_writable(value) for value in row] for row in line.table]
    line.seconds = round(time.monotonic() - began, 2)
    return line


def _writable(value: LineFigure) -> LineFigure:
    """JSON has no infinity and no NaN."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
