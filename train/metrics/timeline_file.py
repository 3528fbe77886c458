"""Reads and writes timeline.json: the actions of one pipeline's ranks in one step.

The file is one JSON object:
    step             index of the sampled step
    schedule         parallel.schedule of the run
    span_seconds     for each pipeline rank: duration of forward and backward of all micro-batches, including waits
    actions          a list with an object per action; the actions of one rank are in their order in time:
        rank             rank in the run
        pp_rank          index of the rank in the pipeline
        stage            index of the model's stage
        kind             F forward, B complete backward, I backward of inputs only, W backward of weights only,
                         FB the forward of one micro-batch together with the backward of another
        micro_batch      index of the micro-batch, from 0
        start_seconds    time from the start of the step to the start of the action
        seconds          duration
        backward         only for FB: [stage, micro-batch] of the backward; stage and micro_batch belong to the forward

A run writes the file for its first pipeline, in an early step and again in its last step. Each rank starts its clock
after a collective right before the step. So the clocks differ by about the latency of a message.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.files import atomic_write_text, read_plain_json

TIMELINE_FILE = "timeline.json"


@dataclass(frozen=True)
class SampledStep:
    """The content of timeline.json."""

    step: int
    schedule: str
    span_seconds: list[float]
    actions: list[dict[str, Any]]

    @property
    def span(self) -> float:
        """Seconds from the common start of all ranks to the end of the rank that ends last."""
        return max(self.span_seconds)

    @property
    def bubble(self) -> float:
        """Fraction of the ranks' time in which they run no action."""
        busy = sum(action["seconds"] for action in self.actions)
        return 1 - busy / (self.span * len(self.span_seconds))


def write_timeline(folder: Path, sampled: SampledStep) -> None:
    """Write timeline.json into a run folder, atomically."""
    atomic_write_text(folder / TIMELINE_FILE, json.dumps(asdict(sampled), separators=(",", ":")))


def read_timeline(folder: Path) -> SampledStep | None:
    """Reads timeline.json from a run folder; None without the file."""
    path = folder / TIMELINE_FILE
    try:
        return SampledStep(**read_plain_json(path)) if path.exists() else None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(TIMELINE_FILE, path, f"is damaged: {error}", "remove it; the run writes a new file") from error
