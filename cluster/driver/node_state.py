"""Where a run stands, and how each of its nodes is, as the supervisor sees them."""

from dataclasses import dataclass, field
from enum import Enum

from cluster.topology import Node


class DriverPhase(Enum):
    gathering = "waiting for nodes"
    running = "running"
    judging = "finding the cause"
    ending = "ending ranks"
    stopping = "stopping"
    done = "done"


class NodeHealth(Enum):
    ok = "ok"
    silent = "does not answer"
    gone = "lost"
    returning = "its agent starts again"


@dataclass
class NodeState:
    node: Node
    heard: float
    health: NodeHealth = NodeHealth.ok
    live: set[int] = field(default_factory=set)
    """Ranks that run there, as far as is known."""
    draining: bool = False
    """It is about to go: it gets no further ranks."""

    @property
    def usable(self) -> bool:
        """Whether an attempt may start there, once no rank lives there."""
        return self.health is NodeHealth.ok and not self.draining
