"""Measures the work of this rank's pipeline and dispatcher in a step; sums over all ranks become metrics.

Each rank sends its share of a mean, divided by the world size, so that a sum gives the mean (train/loop/measure.py).
A metric that a layout cannot have (a bubble without a pipeline, traffic without expert parallelism) is left out.

A rank's busy time is the time of its actions. Inside an action it may also wait, for tokens from other experts' ranks
(dispatch_wait_seconds) or for sharded weights. The bubble is only the time between actions.

`busy` is this rank's own work without both kinds of waiting, so a slow rank stands out from ranks that wait for it.
With NCCL the host does not wait for tokens: there a slow rank's whole expert group looks slow.
"""

from collections.abc import Sequence

from parallel.layout import Layout
from train.rank_parts import RankModel

_BYTES = ("dispatch_bytes_inside", "dispatch_bytes_across")


class StepWork:
    """Reads the pipeline's timeline and the dispatcher's counters; names as in train/metrics/names.py."""

    def __init__(self, parts: RankModel, layout: Layout):
        self._timeline, self._layout = parts.pipeline.timeline, layout
        self._counters = None if parts.dispatcher is None else parts.dispatcher.counters
        self._has_pairs = parts.pipeline.facts.pairs
        self.busy = 0.0
        """Seconds of this rank's own work in the last collected step."""
        self._names = list(self._read())

    def clear(self) -> None:
        """Start a new step: reset the counters, which may include a validation's traffic."""
        if self._counters is not None:
            self._counters.take()

    def collect(self) -> list[float]:
        """This rank's terms for the step that has just ended on the device; every rank returns the same number of
        terms."""
        return list(self._read().values())

    def named(self, sums: Sequence[float]) -> dict[str, float]:
        """Metrics from the sums of all ranks' terms."""
        values = dict(zip(self._names, sums, strict=True))
        return {name: int(value) if name in _BYTES else value for name, value in values.items()}

    def _read(self) -> dict[str, float]:
        record, world = self._timeline.newest(), self._layout.world
        values: dict[str, float] = {}
        self.busy = record.busy
        if self._layout.pp > 1:
            values["bubble_share"] = record.bubble / world
        values["forward_seconds"] = record.seconds("F") / world
        values["backward_seconds"] = record.seconds("B", "I", "W") / world
        if self._has_pairs:
            values["overlapped_seconds"] = record.seconds("FB") / world
        if self._counters is not None:
            taken = self._counters.take()
            passes = (taken.forward, taken.backward)
            values["dispatch_bytes_inside"] = sum(traffic.inside_bytes for traffic in passes)
            values["dispatch_bytes_across"] = sum(traffic.across_bytes for traffic in passes)
            waited = sum(traffic.waited for traffic in passes)
            values["dispatch_wait_seconds"] = waited / world
            self.busy -= waited
        return values
