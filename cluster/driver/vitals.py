"""Health of nodes, as their agents report it: process priority, clock jumps and full disks. None of them ends a run.

A low priority slows down the ranks. A full disk for temporary files loses output of ranks and prevents the next start.

The driver orders errors by time, so this file converts each node's times to the driver's clock: it subtracts the
seconds by which the node's clock was ahead when the node passed the checks. This difference stays constant, because the
node reads later times from a clock that nobody can set.
"""

from dataclasses import dataclass

from cluster.node.agent import Answer
from cluster.node.preflight import CLOCK_LIMIT, SCRATCH_LIMIT
from cluster.topology import Node


@dataclass
class _Vitals:
    name: str
    ahead: float = 0.0
    """Seconds by which the node's clock was ahead of the driver's when the node passed the checks."""
    reported: float = 0.0
    """Seconds by which somebody has set the node's clock ahead since the node passed the checks, as last reported."""
    full: bool = False
    niceness: int = 0


class Vitals:
    """Health of all nodes, as far as the driver knows it."""

    def __init__(self) -> None:
        self._nodes: dict[str, _Vitals] = {}
        """Health of each node, by node id."""
        self._low: set[str] = set()
        """Names of the low-priority nodes that were already reported."""

    def know(self, node: Node, ahead: float, niceness: int = 0) -> None:
        """Record a node that passed the checks. ahead: seconds by which its clock is ahead of the driver's."""
        self._nodes[node.id] = _Vitals(node.name, ahead, niceness=niceness)

    def low(self, niceness: int) -> dict[str, int]:
        """Return name and niceness of the nodes whose agents have a higher niceness (lower priority), each once."""
        found = {each.name: each.niceness for each in self._nodes.values() if each.niceness > niceness}
        fresh = {name: value for name, value in found.items() if name not in self._low}
        self._low |= fresh.keys()
        return fresh

    def take(self, node: Node, answer: Answer) -> list[tuple[str, str]]:
        """Convert the failure times in `answer` to the driver's clock. Returns new problems as (kind, text)."""
        known = self._nodes[node.id]
        for report in answer.ranks:
            if report.failure is not None:
                report.failure.time -= known.ahead
        return [*_watch_clock(known, answer.clock_set), *_watch_disk(known, answer.free_bytes)]


def _watch_clock(node: _Vitals, clock_set: float) -> list[tuple[str, str]]:
    jump = clock_set - node.reported
    if abs(jump) <= CLOCK_LIMIT:
        return []
    node.reported = clock_set
    ahead = f"{abs(jump):.1f} s {'forward' if jump > 0 else 'back'}"
    return [
        ("clock", f"{node.name}: its clock jumped {ahead}; the run continues, and times in this node's logs are wrong")
    ]


def _watch_disk(node: _Vitals, free: float) -> list[tuple[str, str]]:
    was_full, node.full = node.full, free < SCRATCH_LIMIT
    if not node.full or was_full:
        return []
    text = f"{free / 2**20:.0f} MiB free for temporary files, {SCRATCH_LIMIT >> 20} are needed"
    return [("disk", f"{node.name}: {text}; free some space: the output of its ranks is lost when the disk is full")]
