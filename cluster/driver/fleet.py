"""The interface between a driver and the agents. Calls never block; the driver takes answers as they arrive.

Runs use cluster/driver/ray_backend.py; tests use a fleet whose agents live in the same process.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol

from cluster.node.agent import Agent
from cluster.topology import Node

Arguments = ParamSpec("Arguments")

WAITING = (Agent.ask.__name__, Agent.network.__name__)
"""Agent methods that may block; all other methods return at once."""


@dataclass(frozen=True)
class Reply:
    """The outcome of one call to an agent."""

    node: str
    method: str
    value: Any = None
    error: str | None = None
    """The exception that the method raised, or how the agent died."""
    dead: bool = False
    """Whether the agent is gone. The next call then starts a new agent."""

    def is_of(self, method: Callable) -> bool:
        """Whether this is the outcome of a call to this method of `Agent`."""
        return self.method == method.__name__


class FleetLost(RuntimeError):
    """The list of nodes is no longer available. Agents that were reached before may still answer."""


class Fleet(Protocol):
    """The agents of all nodes, by node id."""

    def nodes(self) -> list[Node]:
        """Return the nodes that are believed to be alive. Raises FleetLost."""

    def draining(self) -> dict[str, str]:
        """Return the nodes that will be removed soon, and why."""

    def describe_return(self, node: Node) -> str:
        """Return text that says what a person must do to bring back a node that is listed as dead. Return an empty text
        if no node can come back."""

    def release(self, node: str) -> None:
        """End the agent of a draining node, so that the node can be removed."""

    def call(self, node: str, method: str, *arguments: Any) -> None:
        """Call the method of `Agent` with this name on a node; see `call_agent`. The first call starts the agent.

        Each WAITING method is a group of its own, and the other methods are one group. The calls of a group run one
        after another; groups do not wait for each other.
        """

    def replies(self, timeout: float) -> list[Reply]:
        """Return the outcomes that arrived since the last call of this method. If no outcome arrived, wait up to
        `timeout` seconds for the first."""

    def close(self) -> None:
        """End all agents. Their ranks end with them."""


def call_agent(
    fleet: Fleet,
    node: str,
    method: Callable[Concatenate[Agent, Arguments], Any],
    *arguments: Arguments.args,
    **named: Arguments.kwargs,
) -> None:
    """Call a method of a node's agent.

    method: the method as an attribute of the class, such as `Agent.facts`. Pass the method's arguments by position.
    """
    assert not named, named
    fleet.call(node, method.__name__, *arguments)
