"""The interface between a driver and the agents of the nodes. Calls never block."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol

from cluster.node.agent import Agent
from cluster.topology import Node

Arguments = ParamSpec("Arguments")

WAITING = (Agent.ask.__name__, Agent.network.__name__)
"""Methods of `Agent` that may block; the others return at once."""


@dataclass(frozen=True)
class Reply:
    """The outcome of one call to an agent."""

    node: str
    method: str
    value: Any = None
    error: str | None = None
    """The method's exception or the agent's end as text; else None."""
    dead: bool = False
    """Whether the agent has died. The next call starts another."""

    def is_of(self, method: Callable) -> bool:
        """Whether this is the outcome of a call to this method."""
        return self.method == method.__name__


class FleetLost(RuntimeError):
    """The node list is no longer available. Connected agents may still answer."""


class Fleet(Protocol):
    """The agents of all nodes, by node id."""

    def nodes(self) -> list[Node]:
        """Return the nodes that are believed to be alive. Raises FleetLost."""

    def draining(self) -> dict[str, str]:
        """Return the nodes that will be removed soon, and why."""

    def describe_return(self, node: Node) -> str:
        """Return what a user must do to bring back a dead node, if it can come back."""

    def release(self, node: str) -> None:
        """End the agent of a draining node."""

    def call(self, node: str, method: str, *arguments: Any) -> None:
        """Call the method `method` of the node's `Agent`; see `call_agent`. The first call starts the agent.

        Calls run one after another, in a queue for each method in WAITING and a queue for the others.
        """

    def replies(self, timeout: float) -> list[Reply]:
        """Return the new outcomes. If there are none, wait up to `timeout` seconds for one."""

    def close(self) -> None:
        """End all agents. The agents end their ranks."""


def call_agent(
    fleet: Fleet,
    node: str,
    method: Callable[Concatenate[Agent, Arguments], Any],
    *arguments: Arguments.args,
    **named: Arguments.kwargs,
) -> None:
    """Call a method of a node's agent with positional arguments. method: such as `Agent.facts`."""
    assert not named, named
    fleet.call(node, method.__name__, *arguments)
