"""Profiles some steps on some ranks with torch's profiler, and adds the names of Sluice's parts to the trace.

runs/NAME/profile/
    rank_0.trace.json.gz   every operation with its time; https://ui.perfetto.dev opens it
    rank_0.json            the operations with the most time: part, operation, calls and seconds per step

In the trace, a part of the model appears as calls of its methods, recorded only in profiled steps. A backward operation
belongs to the part of its forward operation.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from conf.disk import explain_disk_error
from conf.files import atomic_write_text
from conf.run_paths import RunPaths
from conf.schema import Config
from conf.words import steps_in_words
from train.data.batch import Batch
from train.loop.live_run import LiveRun
from train.model.deepseek import Head
from train.model.layers import FFN, Embedding, RMSNorm
from train.model.mla import MLA
from train.model.moe import MoE
from train.model.router import Router
from train.rank_parts import ParallelModel

FOLDER = "profile"
TABLE_ROWS = 10
METHODS: dict[type, dict[str, str]] = {
    Embedding: {"forward": "embedding"},
    RMSNorm: {"forward": "norm", "with_remake": "norm"},
    MLA: {"forward": "attention"},
    FFN: {"forward": "FFN"},
    Router: {"forward": "router"},
    MoE: {"run_experts": "experts"},
    Head: {"forward": "head and loss"},
}
"""For each module type, maps the traced methods to the names that the trace shows."""
DISPATCH = {"dispatch_begin": "dispatch", "combine": "dispatch"}
TRAVELS = "_Dispatch", "_Combine"
"""Prefixes of the names of the autograd functions in parallel/expert/dispatcher.py.

The table assigns these functions to the part "dispatch", although they run outside of the methods in `DISPATCH`.
"""
OPTIMIZER = "optimizer"
PART_NAMES = {*(name for methods in METHODS.values() for name in methods.values()), *DISPATCH.values(), OPTIMIZER}
OTHER = "between the parts"


class StepProfiler:
    """Profiles the configured steps of one rank."""

    def __init__(self, config: Config, rank: int, parts: ParallelModel):
        self._first, self._last = config.profile.steps or (0, 0)
        self._watches = bool(config.profile.steps) and rank in config.profile.ranks
        self._rank, self._parts, self._folder = rank, parts, RunPaths(config).path / FOLDER
        self._open = ExitStack()
        self._profile: profile | None = None

    def on_batch(self, run: LiveRun, step: int, batch: Batch) -> None:
        self.begin(step)

    def on_update(self, run: LiveRun, step: int) -> None:
        self.end(step, run.warn)

    on_skip = on_update

    def begin(self, step: int) -> None:
        """Start the profiler before the first profiled step. Call this method before each training step."""
        if self._watches and self._first <= step <= self._last and self._profile is None:
            self._start()

    def end(self, step: int, note: Callable[[str], None]) -> None:
        """End the profile after the last profiled step. Call this method after each step.

        note: a function that receives the table for the user.
        """
        if self._profile is not None and step == self._last:
            self._finish(self._last - self._first + 1, note)

    def close(self, run: LiveRun | None = None) -> None:
        """Discard the profile if the run ends before the last profiled step."""
        self._watches = False
        self._open.close()

    def _start(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # otherwise Kineto prints its own lines to the terminal
        self._open.enter_context(named(self._parts))
        on_gpu = [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._profile = self._open.enter_context(profile(activities=[ProfilerActivity.CPU, *on_gpu]))

    def _finish(self, steps: int, note: Callable[[str], None]) -> None:
        self._open.close()
        assert self._profile is not None
        rows = largest(self._profile.events() or [], steps)
        trace = self._folder / f"rank_{self._rank}.trace.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(trace))
            body = {"rank": self._rank, "steps": [self._first, self._last], "rows": rows}
            atomic_write_text(self._folder / f"rank_{self._rank}.json", json.dumps(body))
        except OSError as error:
            note(f"the profile could not be written ({explain_disk_error(error)})")
            return
        profiled = steps_in_words((self._first, self._last))
        title = f"rank {self._rank}, {profiled}: the operations of a step with the most time"
        note(
            "\n".join([title, *table_lines(rows), f"  all operations: {trace} (open it with https://ui.perfetto.dev)"])
        )


@contextmanager
def named(parts: ParallelModel) -> Iterator[None]:
    """Returns a context in which the trace names the methods of Sluice's parts and the pipeline's actions."""
    with ExitStack() as stack:
        dispatchers: dict[int, Any] = {}
        for module in (module for chunk in parts.pipeline.modules for module in chunk.modules()):
            for method, name in METHODS.get(type(module), {}).items():
                stack.enter_context(_wrapped(module, method, name))
            if isinstance(module, MoE):
                dispatchers[id(module.dispatcher)] = module.dispatcher
        for dispatcher in dispatchers.values():
            for method, name in DISPATCH.items():
                stack.enter_context(_wrapped(dispatcher, method, name))
        stack.enter_context(_wrapped(parts.zero, "step", OPTIMIZER))
        stack.enter_context(_wrapped_actions(parts.pipeline.timeline))
        yield


@contextmanager
def _wrapped(owner: Any, method: str, name: str) -> Iterator[None]:
    """Returns a context in which the trace records each call of `owner`'s method under `name`."""
    plain = getattr(owner, method)

    @wraps(plain)
    def work(*values: Any, **words: Any) -> Any:
        with record_function(name):
            return plain(*values, **words)

    setattr(owner, method, work)
    try:
        yield
    finally:
        delattr(owner, method)


@contextmanager
def _wrapped_actions(timeline: Any) -> Iterator[None]:
    plain = timeline.action

    @contextmanager
    def action(kind: str, stage: int, micro_batch: int, backward: tuple[int, int] | None = None) -> Iterator[None]:
        name = f"{kind}, stage {stage}, micro-batch {micro_batch}"
        with record_function(name), plain(kind, stage, micro_batch, backward):
            yield

    timeline.action = action
    try:
        yield
    finally:
        del timeline.action


def largest(events: Sequence[FunctionEvent], steps: int) -> list[dict[str, Any]]:
    """Returns a table of the operations with the most time, the longest first. Each row is one operation in one part.

    The time of a row excludes nested operations. All rows have GPU times if any operation ran on a GPU, else CPU times.
    """
    of_forward = {event.sequence_nr: part for event in events if event.sequence_nr >= 0 and (part := _part(event, {}))}
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str], int] = defaultdict(int)
    on_gpu = any(event.self_device_time_total for event in events)
    for event in events:
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if own > 0 and not event.is_user_annotation:
            key = _part(event, of_forward) or OTHER, event.name.removeprefix("autograd::engine::evaluate_function: ")
            seconds[key] += own / 1e6 / steps
            calls[key] += 1
    whole = sum(seconds.values())
    found = sorted(seconds, key=lambda key: -seconds[key])[:TABLE_ROWS]
    return [
        {
            "part": part,
            "operation": name,
            "calls": calls[part, name] / steps,
            "seconds": seconds[part, name],
            "share": seconds[part, name] / whole,
        }
        for part, name in found
    ]


def _part(event: FunctionEvent, of_forward: dict[int, str]) -> str | None:
    """Returns the innermost part in which an operation ran. A backward operation has the part of its forward operation.

    of_forward: maps the sequence number of a forward operation to its part.
    """
    above: FunctionEvent | None = event
    while above is not None:
        if above.name in PART_NAMES:
            return above.name
        if above.name.startswith(TRAVELS):
            return "dispatch"
        if above.name.startswith("autograd::engine::evaluate_function") and above.sequence_nr in of_forward:
            return of_forward[above.sequence_nr]
        above = above.cpu_parent
    return None


def table_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Formats the table as lines for a terminal."""
    lines = [f"  {'part':18}{'operation':44}{'calls':>8}{'ms':>10}{'share':>8}"]
    for row in rows:
        lines.append(
            f"  {row['part']:18}{row['operation']:44.42}{row['calls']:8.0f}{1e3 * row['seconds']:10.2f}{row['share']:8.1%}"
        )
    return lines
