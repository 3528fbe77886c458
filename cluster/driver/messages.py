"""The messages of the supervisor: events (inputs) and actions (outputs)."""

from dataclasses import dataclass, field
from enum import Enum

from cluster.cause import RankReport
from cluster.run_files import Age
from cluster.topology import Node, Placement

# Phase of a run, and health of each node, as the supervisor sees them.


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
    returning = "its agent restarts"


@dataclass
class NodeState:
    node: Node
    heard: float
    health: NodeHealth = NodeHealth.ok
    live: set[int] = field(default_factory=set)
    """Ranks that run on the node, according to the last news."""
    draining: bool = False
    """Whether the node will be removed soon and gets no ranks."""

    @property
    def usable(self) -> bool:
        """Whether the next attempt may use this node, once earlier ranks have ended."""
        return self.health is NodeHealth.ok and not self.draining


# Events -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NodeJoined:
    """A listed node has passed the checks. Its agent answers; it has no ranks."""

    node: Node


@dataclass(frozen=True)
class NodeLost:
    """A node is dead. If `returning`, only its agent is dead, and the node can return."""

    node: str
    why: str
    returning: bool = False
    last: bool = False
    """Whether no node can join the run any more."""


@dataclass(frozen=True)
class AgentBeat:
    """An agent's answer: the attempt of its ranks (0 if it has no ranks), and their reports."""

    node: str
    attempt: int
    ranks: list[RankReport]


@dataclass(frozen=True)
class NodeHeard:
    """A node is alive; the event says nothing about its ranks."""

    node: str


@dataclass(frozen=True)
class NodeProbed:
    node: str


@dataclass(frozen=True)
class StacksPrinted:
    """Tracebacks and compressed communication rings of an attempt's ranks, by rank."""

    attempt: int
    texts: dict[int, str]
    rings: dict[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class StartFailed:
    attempt: int
    node: str
    text: str


@dataclass(frozen=True)
class CheckpointSaved:
    """A new checkpoint on disk is complete. age: age of the newest checkpoint."""

    age: Age


@dataclass(frozen=True)
class CopyHeld:
    """The newest in-memory copy that is complete on reachable nodes. age: NONE without a copy."""

    age: Age


@dataclass(frozen=True)
class NodeDraining:
    """A node will be removed soon."""

    node: str
    why: str


@dataclass(frozen=True)
class StopAsked:
    why: str


@dataclass(frozen=True)
class LayoutsPlanned:
    """The memory need of smaller layouts is now known."""


@dataclass(frozen=True)
class Tick:
    pass


Event = (
    NodeJoined
    | NodeLost
    | AgentBeat
    | NodeHeard
    | NodeProbed
    | StacksPrinted
    | StartFailed
    | CheckpointSaved
    | CopyHeld
    | NodeDraining
    | StopAsked
    | LayoutsPlanned
    | Tick
)


# Actions ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StartAttempt:
    attempt: int
    placement: Placement


@dataclass(frozen=True)
class EndRanks:
    """Kill the ranks of this and older attempts on these nodes."""

    attempt: int
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class StopRanks:
    """Ask the ranks to write a checkpoint and to exit with code 75. in_memory: whether a copy in memory is enough. why:
    reason for the user.
    """

    attempt: int
    nodes: tuple[str, ...]
    why: str
    in_memory: bool = False


@dataclass(frozen=True)
class ProbeLinks:
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class CollectStacks:
    """Ask these nodes' ranks for their stacks. native: whether to include native threads."""

    attempt: int
    nodes: tuple[str, ...]
    native: bool = False


@dataclass(frozen=True)
class Note:
    """A line for events.jsonl and the terminal."""

    attempt: int
    kind: str
    text: str
    fields: dict = field(default_factory=dict)


@dataclass(frozen=True)
class KeepIncident:
    """Write the incident to disk (cluster/incident.py), and show its screen."""

    attempt: int
    incident: dict


@dataclass(frozen=True)
class PassIncident:
    """Record in the newest incident that the ranks continued, after `seconds` of silence."""

    seconds: float


@dataclass(frozen=True)
class FinishRun:
    code: int
    text: str


SupervisorAction = (
    StartAttempt | EndRanks | StopRanks | ProbeLinks | CollectStacks | Note | KeepIncident | PassIncident | FinishRun
)
