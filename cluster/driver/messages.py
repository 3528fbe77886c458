"""What the supervisor is told (events) and what it wants done (actions)."""

from dataclasses import dataclass, field
from enum import Enum

from cluster.cause import RankReport
from cluster.run_files import Age
from cluster.topology import Node, Placement

# Where a run stands, and how each of its nodes is, as the supervisor sees them.


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


# What happens -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NodeJoined:
    """A node is there, its agent answers, and it passed the checks; it holds no rank of ours."""

    node: Node


@dataclass(frozen=True)
class NodeLost:
    """A node, or just its agent (returning), is known to be dead."""

    node: str
    why: str
    returning: bool = False
    last: bool = False
    """Neither it nor another one can come."""


@dataclass(frozen=True)
class AgentBeat:
    """An agent's answer: the attempt whose ranks it holds (0 for none) and how they are."""

    node: str
    attempt: int
    ranks: list[RankReport]


@dataclass(frozen=True)
class NodeHeard:
    """A node lives; of its ranks nothing is said."""

    node: str


@dataclass(frozen=True)
class NodeProbed:
    node: str


@dataclass(frozen=True)
class StacksPrinted:
    """Tracebacks of the ranks of an attempt, and what they communicated last, packed; by rank."""

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
    """A checkpoint is whole, the newest on disk."""

    age: Age


@dataclass(frozen=True)
class CopyHeld:
    """The newest copy of the state that is whole in the memory of the nodes that answer, or NONE."""

    age: Age


@dataclass(frozen=True)
class NodeDraining:
    """A node is about to go."""

    node: str
    why: str


@dataclass(frozen=True)
class StopAsked:
    why: str


@dataclass(frozen=True)
class LayoutsPlanned:
    """It is known what smaller layouts need."""


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


# What to do ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StartAttempt:
    attempt: int
    placement: Placement


@dataclass(frozen=True)
class EndRanks:
    """Kill the ranks of this attempt and older ones on these nodes."""

    attempt: int
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class StopRanks:
    """Ask the ranks for a checkpoint and exit code 75. in_memory: a copy in memory will do; why: for people."""

    attempt: int
    nodes: tuple[str, ...]
    why: str
    in_memory: bool = False


@dataclass(frozen=True)
class ProbeLinks:
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class CollectStacks:
    """native: of native threads too."""

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
    """Write it, as cluster/incident.py has it, and show its screen."""

    attempt: int
    incident: dict


@dataclass(frozen=True)
class PassIncident:
    """The run goes on after this silence, of which its newest incident tells."""

    seconds: float


@dataclass(frozen=True)
class FinishRun:
    code: int
    text: str


SupervisorAction = (
    StartAttempt | EndRanks | StopRanks | ProbeLinks | CollectStacks | Note | KeepIncident | PassIncident | FinishRun
)
