"""Tests the network before step 0: measures latency and bandwidth between pairs of nodes, and names slow pairs. It is
no benchmark.

Each node has one partner per round. There are at most 63 rounds. Thousands of nodes run fewer rounds, but at least 7.
The nodes run the rounds without the driver (cluster/node/network_probe.py).
"""

import statistics
from dataclasses import dataclass

from cluster.driver.fleet import Fleet, Reply, call_agent
from cluster.node.agent import Agent
from cluster.node.network_probe import PAIR_SECONDS, NodeLink
from cluster.topology import Node

SLOW_FACTOR = 3.0
"""A pair of nodes is slow in either of these cases:

    - its bandwidth is below the median divided by this factor
    - its latency is above the median times this factor, and above the median plus 1 ms
"""
ROUNDS = 63
LEAST_ROUNDS = 7
PAIRS = 16384
"""Maximum number of tested pairs, unless LEAST_ROUNDS rounds have more pairs."""


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Return rounds of pairs by the circle method. A node has at most one partner per round."""
    players = list(range(count + count % 2))
    found = []
    for _ in range(min(len(players) - 1, ROUNDS, max(LEAST_ROUNDS, 2 * PAIRS // max(count, 1)))):
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        found.append([(min(pair), max(pair)) for pair in pairs if max(pair) < count])
        players = [players[0], players[-1], *players[1:-1]]
    return found


@dataclass(frozen=True)
class LinkVerdict:
    text: str
    slow: list[tuple[str, str, float, float]]
    """Pairs much slower than the median, as (from, to, Gbit/s, ms)."""
    unreachable: list[str]
    """One sentence for every pair that cannot connect."""
    pairs: int
    median_gbit: float


class NetworkTest:
    """Makes the nodes of a fleet run the network test, and collects the results.

    Call `advance` often, and `take` with every reply of an agent. ports: port of each node.
    """

    def __init__(self, nodes: list[Node], ports: dict[str, int], fleet: Fleet, now: float):
        self._nodes = nodes
        self._partners: dict[str, list[Node]] = {}
        """For each node without results: its partners in the test."""
        self._links: dict[tuple[str, str], NodeLink] = {}
        played = rounds(len(nodes))
        self._deadline = now + PAIR_SECONDS * (2 + len(played))
        turns: dict[str, list[tuple[str, int] | None]] = {node.id: [] for node in nodes}
        for a, b in (pair for round in played for pair in round):
            here, there = nodes[a], nodes[b]
            if port := ports.get(there.id):
                self._partners.setdefault(here.id, []).append(there)
                turns[here.id].append((there.address, port))
                turns[there.id].append(None)
            else:
                self._links[here.id, there.id] = NodeLink(there.address, error="the node opened no port for the test")
        for id in self._partners:
            call_agent(fleet, id, Agent.network, turns[id])

    def take(self, reply: Reply) -> None:
        """Process an agent's answer to a call of this test."""
        if reply.error is None:
            for partner, link in zip(self._partners.pop(reply.node), reply.value, strict=True):
                self._links[reply.node, partner.id] = link

    def advance(self, now: float) -> LinkVerdict | None:
        """Return the verdict when all results have arrived or the time is over, else None."""
        if self._partners and now < self._deadline:
            return None
        for id, partners in self._partners.items():
            for partner in partners:
                self._links[id, partner.id] = NodeLink(partner.address, error="no result before the time limit")
        return self._verdict()

    def _verdict(self) -> LinkVerdict:
        names = {node.id: node.name for node in self._nodes}
        good = {pair: link for pair, link in self._links.items() if link.error is None}
        unreachable = [
            f"{names[a]} cannot reach {names[b]} ({link.address}): {link.error}"
            for (a, b), link in self._links.items()
            if link.error is not None
        ]
        gbit = statistics.median([link.gbit for link in good.values()] or [0.0])
        delay = statistics.median([link.milliseconds for link in good.values()] or [0.0])
        slow = [
            (names[a], names[b], round(link.gbit, 3), round(link.milliseconds, 3))
            for (a, b), link in good.items()
            if link.gbit < gbit / SLOW_FACTOR or link.milliseconds > max(SLOW_FACTOR * delay, delay + 1)
        ]
        text = f"{len(good)} pairs of nodes: median {gbit:.3g} Gbit/s, {delay:.3g} ms"
        for a, b, pair_gbit, pair_delay in sorted(slow, key=lambda pair: pair[2]):
            text += f"; slow: {a} - {b} {pair_gbit:.3g} Gbit/s, {pair_delay:.3g} ms"
        return LinkVerdict(text, slow, unreachable, len(good), gbit)
