"""What this rank's pipeline and dispatcher did in a step, as numbers that become metrics when summed over all ranks.

Means over ranks are sent as shares of the world's size, so that a sum is all they need (train/loop/measure.py has it). A
metric that a layout cannot have (a bubble without a pipeline, traffic without expert parallelism) is left out.

A rank's busy time is that of its actions. Inside an action it may wait as well, for tokens from other experts' ranks
(dispatch_wait_seconds) or for sharded weights; the bubble is only what the schedule leaves empty between actions.

`busy` is what this rank did itself, with both kinds of waiting taken out, so that a slow rank stands out from those
that wait for it. With NCCL the host does not wait for tokens: there a slow rank's expert group looks slow as a whole.
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
        """Seconds of this rank's own work in the step that was collected last."""
        self._names = list(self._read())

    def clear(self) -> None:
        """Start a new step: forget what a validation moved since the last."""
        if self._counters is not None:
            self._counters.take()

    def collect(self) -> list[float]:
        """This rank's summands of the step that has just ended on the device; the same number of them on every rank."""
        return list(self._read().values())

    def named(self, sums: Sequence[float]) -> dict[str, float]:
        """Metrics from the sums over all ranks of what they collected."""
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
