"""How a driver reaches the agents of the nodes: calls that never wait, answers as they come.

The one in use is cluster/driver/ray_backend.py; tests have one whose agents live in the same process.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from cluster.topology import Node

WAITING = ("ask", "network")
"""Methods of an agent that take their time; the others return at once."""


@dataclass(frozen=True)
class Reply:
    """The outcome of one call to an agent."""

    node: str
    method: str
    value: Any = None
    error: str | None = None
    """What the method raised, or how the agent died."""
    dead: bool = False
    """The agent is gone; a call starts a new one."""


class FleetLost(RuntimeError):
    """Nobody can tell any longer which nodes there are; agents that were reached before may still answer."""


class Fleet(Protocol):
    """Agents by node id."""

    def nodes(self) -> list[Node]:
        """Nodes that are believed to be alive. Raises FleetLost."""
        ...

    def draining(self) -> dict[str, str]:
        """Nodes that will soon go, and why."""
        ...

    def release(self, node: str) -> None:
        """End the agent of a node that is about to go, so that it may go."""
        ...

    def call(self, node: str, method: str, *arguments: Any) -> None:
        """Call a method of cluster.node.agent.Agent there. The first call starts the agent.

        Calls of a WAITING method come one after another, and so do all calls of the others together; neither waits for the other.
        """
        ...

    def replies(self, timeout: float) -> list[Reply]:
        """Outcomes since the last time; waits up to `timeout` seconds for the first."""
        ...

    def close(self) -> None:
        """End all agents, and with them their ranks."""
        ...
