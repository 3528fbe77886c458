"""Measures the work of this rank's pipeline and dispatcher in a step. Sums over all ranks become metrics.

Each rank divides its values by the world size, so the sum over all ranks is the mean.

- bubble: the time between a rank's pipeline actions, without waits inside an action (dispatch_wait_seconds)
- `busy`: the time in which this rank works, without any waits. It is large on a slow rank. With NCCL it is large on the
  whole expert group of a slow rank.
"""

from collections.abc import Sequence

from parallel.layout import Layout
from train.rank_parts import RankModel

_BYTES = ("dispatch_bytes_inside", "dispatch_bytes_across")


class StepWork:
    """Reads the timeline and the dispatcher's counters into metrics."""

    def __init__(self, parts: RankModel, layout: Layout):
        self._timeline, self._layout = parts.pipeline.timeline, layout
        self._counters = None if parts.dispatcher is None else parts.dispatcher.counters
        self._has_pairs = parts.pipeline.facts.pairs
        self.busy = 0.0
        """Seconds of work in the last collected step, without waits."""
        self._names = list(self._read())

    def clear(self) -> None:
        """Reset the dispatcher's counters, because they may include the work of a validation."""
        if self._counters is not None:
            self._counters.take()

    def collect(self) -> list[float]:
        """Returns this rank's values for the metrics of the last step."""
        return list(self._read().values())

    def named(self, sums: Sequence[float]) -> dict[str, float]:
        """Returns the metrics by name. sums: the values of `collect`, summed over all ranks."""
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
