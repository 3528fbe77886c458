"""How a driver reaches the agents of the nodes: calls that never wait, answers as they come.

The one in use is cluster/driver/ray_backend.py; tests have one whose agents live in the same process.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol

from cluster.node.agent import Agent
from cluster.topology import Node

Arguments = ParamSpec("Arguments")

WAITING = (Agent.ask.__name__, Agent.network.__name__)
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

    def is_of(self, method: Callable) -> bool:
        """Whether this is the outcome of a call of this method of `Agent`."""
        return self.method == method.__name__


class FleetLost(RuntimeError):
    """Nobody can tell any longer which nodes there are; agents that were reached before may still answer."""


class Fleet(Protocol):
    """Agents by node id."""

    def nodes(self) -> list[Node]:
        """Nodes that are believed to be alive. Raises FleetLost."""

    def draining(self) -> dict[str, str]:
        """Nodes that will soon go, and why."""

    def describe_return(self, node: Node) -> str:
        """What somebody has to do so that a node which is listed as dead comes back; empty where neither it nor another one can come."""

    def release(self, node: str) -> None:
        """End the agent of a node that is about to go, so that it may go."""

    def call(self, node: str, method: str, *arguments: Any) -> None:
        """Call the method of `Agent` of this name there; see `call_agent`. The first call starts the agent.

        Calls of a WAITING method come one after another, and so do all calls of the others together; neither waits for the other.
        """

    def replies(self, timeout: float) -> list[Reply]:
        """Outcomes since the last time; waits up to `timeout` seconds for the first."""

    def close(self) -> None:
        """End all agents, and with them their ranks."""


def call_agent(
    fleet: Fleet,
    node: str,
    method: Callable[Concatenate[Agent, Arguments], Any],
    *arguments: Arguments.args,
    **named: Arguments.kwargs,
) -> None:
    """Call a method of the agent of a node. method: as its class has it, `Agent.facts`; its arguments, all by position."""
    assert not named, named
    fleet.call(node, method.__name__, *arguments)
