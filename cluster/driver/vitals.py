"""What agents tell of their nodes beside their ranks: their priority, clocks that jump in the middle of a run, and disks that fill.

Neither ends a run, nor does a low priority, by which other work slows the ranks of a node. A clock matters as errors of several ranks are put in order by their times: those of a node are read by
the driver's clock here. An agent counts them from when the node was checked, by a clock that nobody sets; by how much
the node's clock was ahead then is taken here. How long an answer was on its way must not count: it is more than
lies between an error and those of its victims. A full disk for temporary files costs the output of ranks, and the
next start on that node. Both are named, once each time.
"""

from dataclasses import dataclass

from cluster.node.agent import Answer
from cluster.node.preflight import CLOCK_LIMIT, SCRATCH_LIMIT
from cluster.topology import Node


@dataclass
class _Vitals:
    name: str
    ahead: float = 0.0
    """Seconds by which its clock was ahead when it was checked."""
    told: float = 0.0
    """By how much its clock was set since, as told last."""
    full: bool = False
    niceness: int = 0


class Vitals:
    """What the driver knows of the life of all nodes."""

    def __init__(self) -> None:
        self._nodes: dict[str, _Vitals] = {}
        """By id."""
        self._low: set[str] = set()
        """Names of the nodes of low priority that were told."""

    def know(self, node: Node, ahead: float, niceness: int = 0) -> None:
        """This node was checked, its clock found ahead by so many seconds, and its agent runs at this niceness."""
        self._nodes[node.id] = _Vitals(node.name, ahead, niceness=niceness)

    def low(self, niceness: int) -> dict[str, int]:
        """Niceness of the nodes whose agents run below this one, by name, each told once."""
        found = {each.name: each.niceness for each in self._nodes.values() if each.niceness > niceness}
        fresh = {name: value for name, value in found.items() if name not in self._low}
        self._low |= fresh.keys()
        return fresh

    def take(self, node: Node, answer: Answer) -> list[tuple[str, str]]:
        """Put the times of failures right; returns kind and text of what is to be told."""
        known = self._nodes[node.id]
        for report in answer.ranks:
            if report.failure is not None:
                report.failure.time -= known.ahead
        return [*_watch_clock(known, answer.clock_set), *_watch_disk(known, answer.free_bytes)]


def _watch_clock(node: _Vitals, clock_set: float) -> list[tuple[str, str]]:
    jump = clock_set - node.told
    if abs(jump) <= CLOCK_LIMIT:
        return []
    node.told = clock_set
    ahead = f"{abs(jump):.1f} s {'forward' if jump > 0 else 'back'}"
    return [("clock", f"{node.name}: its clock jumped {ahead}; the run goes on, times in logs of this node are off")]


def _watch_disk(node: _Vitals, free: float) -> list[tuple[str, str]]:
    was_full, node.full = node.full, free < SCRATCH_LIMIT
    if not node.full or was_full:
        return []
    text = f"{free / 2**20:.0f} MiB free for temporary files, {SCRATCH_LIMIT >> 20} are needed"
    return [("disk", f"{node.name}: {text}; output of its ranks is lost once it is full, free some")]
