"""Prints the progress line while a run trains, and the summary when the run ends.

A summary has no boxes and never wraps a command, so paths and commands can be copied.
"""

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from conf.screen import Terminal
from conf.words import folded, sentence
from train.metrics.names import Record
from train.metrics.quantities import duration, short

GOOD, WARN = "bold green", "bold yellow"
LABEL = 12
SAMPLE_LINES = 12


def final_screen(
    name: str,
    steps: int,
    *,
    seconds: float | None = None,
    training_loss: float | None = None,
    validation_loss: float | None = None,
    bits_per_byte: float | None = None,
    plan: str | None = None,
    sample: str | None = None,
    checkpoint: Path | None = None,
    report: Path | str | None = None,
    wandb: str | None = None,
    console: Console | None = None,
) -> None:
    """Prints the summary of a complete run on stdout. Arguments that are None are left out.

    - seconds: wall time of the run.
    - training_loss: mean next-token loss of the last steps.
    - plan: planned and measured quantities.
    - report: path of the report, or why there is none.
    - wandb: address of the W&B run, or folder of the offline run.
    """
    took = f" in {duration(seconds)}" if seconds is not None else ""
    rows = []
    if training_loss is not None and math.isfinite(training_loss):
        rows.append(("Training", f"loss {training_loss:.4f} nats per token, mean of the last steps"))
    if validation_loss is not None:
        rows.append(("Held-out", _held_out(validation_loss, bits_per_byte)))
    if plan:
        rows.append(("Plan", plan))
    if sample:
        rows.append(("Sample", "\n".join(quoted_lines(sample))))
    rows += [("Checkpoint", str(checkpoint))] if checkpoint else []
    if report:
        rows.append(("Report", f"{report}  (open it in a browser)" if isinstance(report, Path) else report))
    if wandb:
        rows.append(("W&B", wandb if wandb.startswith("http") else f"offline; upload with: wandb sync {wandb}"))
    show_rows(console or Terminal(), f"{name}: {steps} steps complete{took}", GOOD, rows)


def stopped_screen(
    name: str,
    step: int,
    steps: int,
    reason: str,
    *,
    checkpoint: Path | None,
    command: str,
    console: Console | None = None,
) -> None:
    """Prints the summary of a stopped run. command: resumes the run."""
    rows = [
        ("Why", reason),
        ("Checkpoint", str(checkpoint) if checkpoint else "none yet: the run would start from step 0"),
        ("Resume with", command),
    ]
    show_rows(console or Terminal(), f"{name}: stopped at step {step} of {steps}", WARN, rows)


def _held_out(loss: float, bits_per_byte: float | None) -> str:
    text = f"loss {loss:.4f} nats per token"
    if bits_per_byte is not None and math.isfinite(bits_per_byte):
        text += f", {bits_per_byte:.4f} bits per byte (lower is better; guessing bytes at random gives 8)"
    return text


def quoted_lines(text: str, indent: str = "") -> list[str]:
    """Returns the first lines of a generated text, for a screen."""
    lines = text.strip().splitlines() or [""]
    return [f"{indent}| {line}" for line in lines[:SAMPLE_LINES]] + [f"{indent}| ..."] * (len(lines) > SAMPLE_LINES)


def show_rows(console: Console, title: str, style: str, rows: list[tuple[str, str]]) -> None:
    """Prints a title in a style (GOOD, WARN), then labelled lines."""
    margin, columns = LABEL + 2, console.width if console.is_terminal else None
    console.print()
    console.print(Text(folded(printable(title, console.encoding), columns, 2), style=style), soft_wrap=True)
    for label, value in rows:
        lines = (" " * margin + line for line in printable(value, console.encoding).split("\n"))
        width = None if label.endswith("with") else columns  # a command to copy stays on one line
        text = "\n".join(folded(line, width, margin) for line in lines)
        console.print(Text.assemble((f"  {label:<{LABEL}}", "dim"), text[margin:]), soft_wrap=True)


def printable(text: str, encoding: str) -> str:
    """Returns the text with placeholders for control characters, and for characters that `encoding` lacks."""
    safe = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return safe.encode(encoding, "replace").decode(encoding)


# Progress at the terminal while a run trains.
#
# A terminal shows one line that is updated. Other output, such as a file or CI log, gets a line for each of the first
# steps. Later lines follow at growing intervals, and after each tenth of the run.

FIRST_STEPS = 3
PLAIN_SECONDS, PLAIN_SHARE = 5.0, 1 / 60
"""Without a terminal, a step prints a line if the last line is older than both limits: PLAIN_SECONDS, and the fraction
PLAIN_SHARE of the elapsed time."""
SMOOTHING = 0.05
"""Weight of the newest step in the moving average."""
MIN_BAR, MAX_BAR = 8, 40
ASCII_BAR = str.maketrans("━╌", "#-")


class StepClock:
    """Moving average of the wall time per step, including stalls."""

    def __init__(self, now: float):
        self._last, self._sum, self._weight = now, 0.0, 0.0

    def tick(self, now: float) -> None:
        self._sum += SMOOTHING * (now - self._last - self._sum)
        self._weight += SMOOTHING * (1 - self._weight)
        self._last = now

    def seconds_per_step(self) -> float:
        return self._sum / self._weight if self._weight else math.nan


class Progress:
    """Shows the progress of a run on the terminal. Several threads may call it.

    - done: steps completed before this start.
    - enabled: whether progress is shown.
    - clock: function that returns seconds.
    """

    def __init__(
        self,
        name: str,
        steps: int,
        *,
        enabled: bool = True,
        done: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._console = console or Terminal()
        self._name, self._steps, self._clock = name, steps, clock
        self._lock = threading.Lock()
        self._record: Record = {"step": done}
        self._event: str | None = None
        self._started = clock()
        self._pace = StepClock(self._started)
        self._shown_at, self._shown_step, self._seen = -math.inf, done, 0
        live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._plain = enabled and not live
        self._live: Live | None = None
        if enabled and live:
            self._live = Live(self, console=self._console, refresh_per_second=5)
            self._live.start()

    def write(self, record: Record) -> None:
        """Show one step."""
        now = self._clock()
        with self._lock:
            self._pace.tick(now)
            held_out = {"validation_loss": self._record["validation_loss"]} if "validation_loss" in self._record else {}
            self._record = held_out | record  # the newest held-out loss is shown until the next validation
            self._seen += 1
            due = self._is_due(record, now)
            if due:
                self._shown_at, self._shown_step = now, record["step"]
        if self._plain and due:
            self._print(f"{self._name}  {self.line(None)}")

    def _is_due(self, record: Record, now: float) -> bool:
        step = record["step"]
        return (
            self._seen <= FIRST_STEPS
            or step == self._steps
            or "validation_loss" in record
            or now - self._shown_at >= max(PLAIN_SECONDS, PLAIN_SHARE * (now - self._started))
            or (step - self._shown_step) * 10 >= self._steps
        )

    def event(self, text: str | None) -> None:
        """Shows an activity that is not a step; None when it ended."""
        with self._lock:
            self._event = text

    def note(self, text: str) -> None:
        """Print a sentence above the progress line, even if no progress line is shown."""
        columns = self._console.width if self._console.is_terminal else None
        self._print(folded(sentence(text, indent=2), columns, 2))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = self.line(options.max_width)
        yield Segment(line.translate(ASCII_BAR) if options.ascii_only else line)

    def line(self, width: int | None) -> str:
        """Returns the progress line. width: maximum characters; None: no limit."""
        with self._lock:
            record, event = self._record, self._event
            left = (self._steps - record["step"]) * self._pace.seconds_per_step()
        return fit(parts(record, self._steps, left, event), record["step"] / max(1, self._steps), width)


def parts(record: Record, steps: int, seconds_left: float, event: str | None) -> list[str]:
    """Returns the progress line's parts, the most important first."""
    found = [f"step {record['step']}/{steps}"]
    if "main_loss" in record:  # no total loss, because it depends on the weights of the other losses
        found.append(f"loss {record['main_loss']:.4g}")
    if event:
        found.append(f"[{event}]")
    if math.isfinite(seconds_left) and record["step"] < steps:
        found.append(f"{duration(seconds_left)} left")
    if "tokens_per_second" in record:
        found.append(f"{short(record['tokens_per_second'])} tokens/s")
    if "validation_loss" in record:
        found.append(f"held-out loss {record['validation_loss']:.4g}")
    if "epochs" in record:
        found.append(f"epoch {record['epochs']:.2f}")
    if "max_vio" in record:
        found.append(f"max_vio {record['max_vio']:.2f}")
    if "mtp_loss" in record:
        found.append(f"MTP loss {record['mtp_loss']:.4g}")
    return found


def fit(pieces: list[str], fraction: float, width: int | None) -> str:
    """Joins the first parts of the progress line that fit into `width` characters. Adds a bar if there is room."""
    if width is None:
        return "  ".join(pieces)
    while len(pieces) > 1 and len("  ".join(pieces)) > width:
        pieces = pieces[:-1]
    room = min(MAX_BAR, width - len("  ".join(pieces)) - 2)
    if room >= MIN_BAR:
        full = round(room * min(1.0, fraction))
        pieces = [pieces[0], "━" * full + "╌" * (room - full), *pieces[1:]]
    return "  ".join(pieces)[:width]
