"""What agents tell of their nodes beside their ranks: clocks that jump in the middle of a run, and disks that fill.

Neither ends a run. A clock matters as errors of several ranks are put in order by their times: those of a node are read by
the driver's clock here, whatever the node's own says. A full disk for temporary files costs the output of ranks, and the
next start on that node. Both are named, once each time.
"""

from dataclasses import dataclass, field

from cluster.node.agent import Answer
from cluster.node.preflight import CLOCK_LIMIT, SCRATCH_LIMIT
from cluster.steady_clock import SteadyClock


@dataclass
class _Node:
    offsets: list[float] = field(default_factory=list)
    """Seconds by which its clock was ahead in the last two answers; what took long to arrive looks late."""
    known: float | None = None
    """The offset that was told, or the first."""
    full: bool = False


class Vitals:
    """Of all nodes, by a clock that is the driver's own."""

    def __init__(self, clock: SteadyClock) -> None:
        self._nodes: dict[str, _Node] = {}
        self._clock = clock

    def take(self, name: str, answer: Answer) -> list[tuple[str, str]]:
        """Put the times of failures right; returns kind and text of what is to be told. name: of the node."""
        node = self._nodes.setdefault(name, _Node())
        node.offsets = [*node.offsets[-1:], answer.clock - self._clock.now()]
        offset = max(node.offsets)
        for report in answer.ranks:
            if report.failure is not None:
                report.failure.time -= offset
        return [*self._watch_clock(name, node, offset), *self._watch_disk(name, node, answer.free_bytes)]

    def _watch_clock(self, name: str, node: _Node, offset: float) -> list[tuple[str, str]]:
        if node.known is None:
            node.known = offset
        jump = offset - node.known
        if abs(jump) <= CLOCK_LIMIT:
            return []
        node.known = offset
        ahead = f"{abs(jump):.1f} s {'forward' if jump > 0 else 'back'}"
        return [("clock", f"{name}: its clock jumped {ahead}; the run goes on, times in logs of this node are off")]

    def _watch_disk(self, name: str, node: _Node, free: float) -> list[tuple[str, str]]:
        was_full, node.full = node.full, free < SCRATCH_LIMIT
        if not node.full or was_full:
            return []
        text = f"{free / 2**20:.0f} MiB free for temporary files, {SCRATCH_LIMIT >> 20} are needed"
        return [("disk", f"{name}: {text}; output of its ranks is lost once it is full, free some")]
