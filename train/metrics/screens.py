"""What a person reads when a run ends: well, or on a signal.

One style: a line with the outcome, then labelled lines. Nothing is boxed or wrapped, so that paths and commands can be
copied from any window.
"""

import math
from pathlib import Path

from rich.console import Console
from rich.text import Text

from conf.screen import Terminal
from train.metrics.quantities import duration

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
    """The end of a run, on stdout. What is None is left out. seconds: wall time of the run.

    training_loss: of the next token, mean of the last steps, to be set beside the held-out one.
    plan: what mode=plan said beside what was measured. report: its path, or why there is none. wandb: address of the W&B run, or folder of the offline run.
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
    show_rows(console or Terminal(), f"{name}: {steps} steps done{took}", GOOD, rows)


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
    """A run that a signal or a limit stopped, on stdout. command: what resumes it."""
    rows = [
        ("Why", reason),
        ("Checkpoint", str(checkpoint) if checkpoint else "none yet: the run would start again"),
        ("Go on with", command),
    ]
    show_rows(console or Terminal(), f"{name}: stopped at step {step} of {steps}", WARN, rows)


def _held_out(loss: float, bits_per_byte: float | None) -> str:
    text = f"loss {loss:.4f} nats per token"
    if bits_per_byte is not None and math.isfinite(bits_per_byte):
        text += f", {bits_per_byte:.4f} bits per byte (lower is better; guessing bytes at random gives 8)"
    return text


def quoted_lines(text: str, indent: str = "") -> list[str]:
    """The first lines of what a model wrote, as a screen shows them."""
    lines = text.strip().splitlines() or [""]
    return [f"{indent}| {line}" for line in lines[:SAMPLE_LINES]] + [f"{indent}| ..."] * (len(lines) > SAMPLE_LINES)


def show_rows(console: Console, title: str, style: str, rows: list[tuple[str, str]]) -> None:
    """A title in a style (GOOD, WARN), then labelled lines."""
    console.print()
    console.print(Text(printable(title, console.encoding), style=style), soft_wrap=True)
    for label, value in rows:
        first, *rest = printable(value, console.encoding).split("\n")
        console.print(Text.assemble((f"  {label:<{LABEL}}", "dim"), first), soft_wrap=True)
        for line in rest:
            console.print(Text(" " * (LABEL + 2) + line), soft_wrap=True)


def printable(text: str, encoding: str) -> str:
    """Without control characters (a sampled escape sequence must not reach the terminal), and what the terminal can show."""
    safe = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return safe.encode(encoding, "replace").decode(encoding)
