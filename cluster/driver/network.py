"""The network before step 0: every pair of nodes, latency and bandwidth over a plain socket; the slow pair is named.

Pairs are tried in the rounds of a tournament, so that every node has one partner at a time and N nodes take N - 1
rounds. The nodes play them among themselves (cluster/node/network_probe.py), as a call to each node for each round would
take the driver longer than the transfers. Not more than 63 rounds are played, and of thousands of nodes fewer, down to 7: every node still meets that many
others. The transfer is short: it finds a bad cable or a route over the wrong interface, it is no benchmark.
"""

import statistics
from dataclasses import dataclass

from cluster.driver.fleet import Fleet, Reply, call_agent
from cluster.node.agent import Agent
from cluster.node.network_probe import PAIR_SECONDS, NodeLink
from cluster.topology import Node

SLOW_FACTOR = 3.0
"""A pair with less than 1/3 of the median bandwidth, or over 3 times the median latency and 1 ms, is named."""
ROUNDS = 63
LEAST_ROUNDS = 7
PAIRS = 16384
"""Where 63 rounds have more pairs than this, fewer rounds are played."""


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Circle method: in each round everyone has at most one partner; together all pairs, up to the limits above."""
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
    """(from, to, gbit, ms) of the pairs far from the median."""
    unreachable: list[str]
    """One sentence for every pair without a connection."""
    pairs: int
    median_gbit: float


class NetworkTest:
    """The driver's side: has the nodes of a fleet play. Call `advance` often and `take` with every reply.

    ports: where each node listens, by its id.
    """

    def __init__(self, nodes: list[Node], ports: dict[str, int], fleet: Fleet, now: float):
        self._nodes = nodes
        self._partners: dict[str, list[Node]] = {}
        """The nodes that each node measures, while its results are out."""
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
                self._links[here.id, there.id] = NodeLink(there.address, error="it opened no port for the test")
        for id in self._partners:
            call_agent(fleet, id, Agent.network, turns[id])

    def take(self, reply: Reply) -> None:
        """An answer of an agent to one of this test's calls."""
        if reply.error is None:
            for partner, link in zip(self._partners.pop(reply.node), reply.value, strict=True):
                self._links[reply.node, partner.id] = link

    def advance(self, now: float) -> LinkVerdict | None:
        """The verdict once all rounds are played."""
        if self._partners and now < self._deadline:
            return None
        for id, partners in self._partners.items():
            for partner in partners:
                self._links[id, partner.id] = NodeLink(partner.address, error="no result in time")
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
