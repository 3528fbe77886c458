"""A fleet whose agents live in this process: one node or several, all on loopback."""

import contextlib
import dataclasses
import os
import queue
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

from cluster.driver.fleet import WAITING, FleetLost, Reply
from cluster.node.agent import Agent, _inherited
from cluster.topology import Node
from tests.hold import HOLD, hold_on
from tests.ranks import CONTEXT, be_module


class ForkedRank:
    """What the agent asks of a subprocess.Popen, for a rank from the fork server: imports are behind it."""

    def __init__(self, arguments: list[str], folder: str | None, environment: dict[str, str], log: str):
        words = arguments, Path(folder or os.getcwd()), environment, [Path(log), Path(log)]
        self._process = CONTEXT.Process(target=_be_rank, args=words)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("a rank", timeout)
        return self.poll()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _be_rank(arguments: list[str], *words: Any) -> None:
    """Become `python -m MODULE ...` or `python tests/cluster/fake_rank.py ...`."""
    os.setsid()  # the agent ends whole sessions
    module, *arguments = arguments[1:] if arguments[0] == "-m" else ["tests.cluster.fake_rank", *arguments[1:]]
    if module == "train.worker":
        hold_on(Path(arguments[-1]).parents[1] / HOLD)
    be_module(module, arguments, *words)


class ForkingAgent(Agent):
    """Starts ranks from the fork server; standbys, which are told on stdin what to do, from nothing."""

    def _popen(self, arguments: list[str], folder: str | None, environment: dict, stdin: Any, output: Any) -> Any:
        if stdin == subprocess.PIPE:
            return super()._popen(arguments, folder, environment, stdin, output)
        return ForkedRank(arguments, folder, _inherited() | environment, output.name)


class LocalFleet:
    def __init__(self, nodes: int, devices: int, lease: float = 10.0, agent: type[Agent] = Agent):
        self._agent = agent
        self._nodes = [Node(f"id{i}", f"n{i}", "127.0.0.1", devices) for i in range(nodes)]
        self.agents: dict[str, Agent] = {}
        self._lease = lease
        self._replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        self.deaf: set[str] = set()
        """Nodes whose link is cut."""
        self.leaving: dict[str, str] = {}
        """Nodes that the cluster lists as about to go, and why."""
        self.pulse = False
        """Whether agents may answer the driver's pulse, which a cut link here does not hold back."""
        self.headless = False
        """Nobody can list the nodes any longer."""

    def nodes(self) -> list[Node]:
        if self.headless:
            raise FleetLost("the head has not answered")
        return self._nodes

    def draining(self) -> dict[str, str]:
        return self.leaving

    def describe_return(self, node: Node) -> str:
        return f"bring {node.name} back"

    def release(self, node: str) -> None:
        self.agents.pop(node).close()

    def call(self, node: str, method: str, *arguments: Any) -> None:
        if node in self.deaf:
            return
        if (agent := self.agents.get(node)) is None:  # one call, as a test kills agents from its own threads
            agent = self.agents[node] = self._agent(self._lease)
        call = node, agent, method, arguments
        if method in WAITING:
            threading.Thread(target=self._answer, args=call, daemon=True).start()
        else:
            self._answer(*call)

    def _answer(self, node: str, agent: Agent, method: str, arguments: tuple) -> None:
        try:
            value = getattr(agent, method)(*arguments)
            value = dataclasses.replace(value, pulse=None) if method == "facts" and not self.pulse else value
            reply = Reply(node, method, value)
        except Exception as error:
            reply = Reply(node, method, error=repr(error))
        if node not in self.deaf and self.agents.get(node) is agent:
            self._replies.put(reply)

    def replies(self, timeout: float) -> list[Reply]:
        found = []
        with contextlib.suppress(queue.Empty):
            found.append(self._replies.get(timeout=timeout))
            while True:
                found.append(self._replies.get_nowait())
        return found

    def kill_agent(self, node: str) -> None:
        self.agents.pop(node).close()
        self._replies.put(Reply(node, "ask", error="killed", dead=True))

    def power_off(self, node: str) -> None:
        """The node, its ranks and its memory are gone, without a word."""
        self.deaf.add(node)
        agent = self.agents[node]
        for child in agent._children.values():
            child.process.send_signal(signal.SIGKILL)
        if agent._store is not None:
            agent._store.close(remove=False)
            shutil.rmtree(agent._store.folder)
            agent._store = None

    def close(self) -> None:
        for agent in self.agents.values():
            agent.close()
