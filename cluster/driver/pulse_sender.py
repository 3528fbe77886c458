"""The driver's part of the pulse: it asks every node by UDP whether it is alive (cluster/node/pulse_echo.py).

If a node answers, the driver asks it less often through Ray.
"""

import collections
import secrets
import socket
from collections.abc import Callable, Iterator

from cluster.node.pulse_echo import ANSWER, LONGEST_DATAGRAM, QUESTION, seal_datagram, unseal

QUESTION_TRIES = 5
"""Minimum number of questions to a node during one heartbeat."""
OFTEN = 1.0
"""Maximum seconds between two questions to a node."""
QUESTIONS_AT_ONCE = 200
"""Maximum number of questions sent at once, because the socket's buffer must hold all answers."""


class Pulse:
    """Sends questions to the nodes and collects their answers; call `ask` and `answers` often. heartbeat: seconds for
    which an answer shows that the node is alive.
    """

    def __init__(self, heartbeat: float):
        self.key = secrets.token_bytes(32)
        self._heartbeat, self._every = heartbeat, min(heartbeat / QUESTION_TRIES, OFTEN)
        self._sockets: dict[str, socket.socket] = {}
        """Sockets by the local address to which each is bound."""
        self._places: dict[str, tuple[socket.socket, tuple[str, int]]] = {}
        self._turn: collections.deque[str] = collections.deque()
        """Nodes in the order in which the driver asks them next."""
        self._asked: dict[str, int] = {}
        """Number of the newest question to each node, until the node answers it."""
        self._heard: dict[str, float] = {}
        self.number = 0
        """Number of the newest question, counted over all nodes."""
        self._last = 0.0

    def know(self, node: str, place: tuple[str, int] | None) -> None:
        """Start to ask this node. place: address as in cluster/node/pulse_echo.py; None without UDP answers."""
        if place is None:
            return
        if node not in self._places:
            self._turn.append(node)
        self._places[node] = self._socket_to(place), place

    def _socket_to(self, place: tuple[str, int]) -> socket.socket:
        family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connect sends nothing; it only chooses the route
            probe.connect(place)
            own = probe.getsockname()[0]
        if own not in self._sockets:
            self._sockets[own] = socket.socket(family, socket.SOCK_DGRAM)
            self._sockets[own].bind((own, 0))
            self._sockets[own].setblocking(False)
        return self._sockets[own]

    def forget(self, node: str) -> None:
        if self._places.pop(node, None) is not None:
            self._turn.remove(node)
        self._asked.pop(node, None)
        self._heard.pop(node, None)

    def hears(self, node: str, now: float) -> bool:
        """Whether the node answered within the last heartbeat."""
        return now - self._heard.get(node, -self._heartbeat) < self._heartbeat

    def ask(self, now: float, wanted: Callable[[str], bool]) -> None:
        """Ask the nodes whose question is due, if `wanted` is true for them. A question also renews the lease of the
        node's agent.
        """
        due = min(int(len(self._turn) * (now - self._last) / self._every), len(self._turn), QUESTIONS_AT_ONCE)
        if not due:
            return
        self._last = now
        for _ in range(due):
            node = self._turn[0]
            self._turn.rotate(-1)
            if wanted(node):
                self.number += 1
                self._asked[node] = self.number
                way, place = self._places[node]
                try:
                    way.sendto(seal_datagram(self.key, QUESTION, self.number, node), place)
                except OSError:  # the link is down or the queue is full; the next question may get through
                    continue

    def hurry(self) -> None:
        """Make all nodes due for the next `ask`, which sends at most QUESTIONS_AT_ONCE questions."""
        self._last -= self._every

    def answers(self, now: float) -> Iterator[tuple[str, int]]:
        """Yield (node, question number) for each answer to a node's newest question."""
        for way in self._sockets.values():
            while True:
                try:
                    datagram = way.recv(LONGEST_DATAGRAM)
                except OSError:  # there is no datagram, or the link is down
                    break
                answer = unseal(self.key, ANSWER, datagram)
                if answer is not None and self._asked.get(answer[1]) == answer[0]:
                    del self._asked[answer[1]]
                    self._heard[answer[1]] = now
                    yield answer[1], answer[0]

    def close(self) -> None:
        for way in self._sockets.values():
            way.close()
