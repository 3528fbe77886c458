"""Simulated nodes for bench/driver.py: a process represents many agents, which answer like cluster/node/agent.py."""

import asyncio
import dataclasses
import functools
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from cluster.cause import RankReport
from cluster.node import preflight
from cluster.node import pulse_echo as pulse
from cluster.node.agent import Answer, Order
from cluster.node.network_probe import NodeLink

STEP = 5.0
"""Duration in seconds of a step on a simulated node."""
LOOK = 0.2
"""Interval in seconds at which a simulated node looks for changes."""
FOREVER = 3600.0


@dataclass
class StubNode:
    """One agent and its ranks."""

    attempt: int = 0
    ranks: dict[int, int | None] = field(default_factory=dict)
    """Exit code of each rank; None while the rank runs."""
    began: float = 0.0
    told: tuple = (0, [])
    silent: bool = False

    def news(self) -> tuple:
        return self.attempt, [rank for rank, code in self.ranks.items() if code is not None]

    def end(self, code: int) -> None:
        self.ranks = {rank: code if old is None else old for rank, old in self.ranks.items()}


class StubHost:
    """Plays the agents of many nodes, in one process."""

    def __init__(self) -> None:
        self._nodes: dict[str, StubNode] = {}
        for work in ("_digest_of_program", "_version"):  # computed once for all nodes
            setattr(preflight, work, functools.cache(getattr(preflight, work)))
        self._key = b""
        self._echo = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._echo.bind(("127.0.0.1", 0))
        threading.Thread(target=self._answer_pulse, daemon=True).start()

    def _answer_pulse(self) -> None:
        """Answers the pulse as cluster/node/pulse_echo.py does, for all nodes of this host."""
        while True:
            datagram, driver = self._echo.recvfrom(pulse.LONGEST_DATAGRAM)
            number, id = pulse.unseal(self._key, pulse.QUESTION, datagram)
            if not self._nodes[id].silent:
                self._echo.sendto(pulse.seal_datagram(self._key, pulse.ANSWER, number, id), driver)

    async def call(self, id: str, method: str, *arguments: Any) -> Any:
        node = self._nodes.setdefault(id, StubNode())
        if node.silent:
            await asyncio.sleep(FOREVER)
        return await getattr(self, f"_{method}")(node, *arguments)

    async def spent(self) -> float:
        """Processor seconds of this host process so far."""
        return time.process_time()

    async def be_silent(self, id: str) -> float:
        """This node no longer answers from now on. Returns the time."""
        self._nodes[id].silent = True
        return time.time()

    async def kill_rank(self, id: str) -> float:
        """One rank of this node dies; returns the time."""
        ranks = self._nodes[id].ranks
        ranks[next(iter(ranks))] = -9
        return time.time()

    async def _facts(self, node: StubNode, question: preflight.Question) -> preflight.Facts:
        self._key = question.key
        return dataclasses.replace(preflight.gather_facts(question), pulse=self._echo.getsockname(), test_port=1)

    async def _network(self, node: StubNode, turns: list[tuple[str, int] | None]) -> list[NodeLink]:
        return [NodeLink(turn[0], 0.1, 10.0) for turn in turns if turn is not None]

    async def _free_port(self, node: StubNode) -> int:
        return 1

    async def _start(self, node: StubNode, order: Order) -> None:
        node.attempt, node.began = order.attempt, time.monotonic()
        node.ranks = {rank: None for rank, _ in order.ranks}
        if 0 not in node.ranks:
            node.told = node.news()

    async def _ask(self, node: StubNode, offsets: dict[int, int], attempt: int = 0, patience: float = 0.0) -> Answer:
        until = time.monotonic() + patience
        while (left := until - time.monotonic()) > 0 and node.news() == node.told:
            await asyncio.sleep(min(LOOK, left))
        if node.silent:
            await asyncio.sleep(FOREVER)
        node.told = node.news()
        step = int((time.monotonic() - node.began) / STEP)
        ranks = [RankReport(r, code, None, step, "step", STEP) for r, code in node.ranks.items()]
        return Answer(node.attempt, ranks)

    _last_words = _ask

    async def _probe(self, node: StubNode) -> None:
        pass

    async def _end(self, node: StubNode, attempt: int) -> None:
        node.end(-9)

    async def _stop(self, node: StubNode, attempt: int, in_memory: bool = False) -> None:
        node.end(75)

    async def _warm(self, node: StubNode, *_: Any) -> None:
        pass

    async def _close(self, node: StubNode) -> None:
        pass
