"""timeline.json: what the ranks of one pipeline did in one step, action by action, as a picture or a program wants it.

One JSON object:

    step             the step that was sampled
    schedule         parallel.schedule of the run
    span_seconds     per pipeline rank, length of forward and backward of all micro-batches, waiting included
    actions          a list of objects, rank by rank, each rank's in order:
        rank             rank in the run
        pp_rank          its place in the pipeline
        stage            stage of the model; for FB that of the forward half
        kind             F forward, B backward, I backward of inputs only, W backward of weights only,
                         FB the forward of one micro-batch together with the backward of another
        micro_batch      number of the micro-batch, from 0; for FB that of the forward half
        start_seconds    seconds since the step began
        seconds          how long it ran
        backward         only for FB: [stage, micro-batch] of the backward half

A run writes it in an early step and in its last one, over the file before. It shows the first pipeline (data-parallel
rank 0); the others do the same at the same time. Ranks begin to count when they leave a collective that they all
entered right before the step, so that their clocks differ by as much as they leave it apart, about the latency of a message: 0.2 ms in
the median and 1 ms at most for two processes on two busy CPU cores; on CUDA the streams meet, not the hosts.
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
        """Seconds from the common start until the last rank is done."""
        return max(self.span_seconds)

    @property
    def bubble(self) -> float:
        """Share of all ranks' time, from the common start until the last is done, in which no action ran."""
        busy = sum(action["seconds"] for action in self.actions)
        return 1 - busy / (self.span * len(self.span_seconds))


def write_timeline(folder: Path, sampled: SampledStep) -> None:
    """Write timeline.json into a run folder, in one move."""
    atomic_write_text(folder / TIMELINE_FILE, json.dumps(asdict(sampled), separators=(",", ":")))


def read_timeline(folder: Path) -> SampledStep | None:
    """The sampled step of a run; None for a run that has none."""
    path = folder / TIMELINE_FILE
    try:
        return SampledStep(**read_plain_json(path)) if path.exists() else None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(TIMELINE_FILE, path, f"is damaged: {error}", "remove it; the run writes another one") from error
