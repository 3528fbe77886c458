"""The driver's side of the pulse: asks every node by UDP whether it is alive (cluster/node/pulse_echo.py).

The driver asks a node that answers by UDP less often through Ray. It asks a node that no datagram reaches through Ray
as often as before.
"""

import collections
import secrets
import socket
from collections.abc import Callable, Iterator

from cluster.node.pulse_echo import ANSWER, LONGEST_DATAGRAM, QUESTION, seal_datagram, unseal

QUESTION_TRIES = 5
"""Minimum number of questions to a node within a heartbeat."""
OFTEN = 1.0
"""Maximum seconds between questions to a node: several must be sent before a probe ends (cluster/driver/policy.py)."""
QUESTIONS_AT_ONCE = 200
"""Questions sent at once, so that their answers fit into the socket's buffer."""


class Pulse:
    """Sends questions and collects answers.

    Call `ask` and `answers` often. heartbeat: seconds for which an answer counts.
    """

    def __init__(self, heartbeat: float):
        self.key = secrets.token_bytes(32)
        self._heartbeat, self._every = heartbeat, min(heartbeat / QUESTION_TRIES, OFTEN)
        self._sockets: dict[str, socket.socket] = {}
        """By the local address from which nodes are asked."""
        self._places: dict[str, tuple[socket.socket, tuple[str, int]]] = {}
        self._turn: collections.deque[str] = collections.deque()
        """Nodes in the order of their questions."""
        self._asked: dict[str, int] = {}
        """Number of the last question to each node."""
        self._heard: dict[str, float] = {}
        self.number = 0
        """Number of the newest question to any node."""
        self._last = 0.0

    def know(self, node: str, place: tuple[str, int] | None) -> None:
        """Start asking this node.

        place: its address, as in cluster/node/pulse_echo.py; None for a node without a pulse.
        """
        if place is None:
            return
        if node not in self._places:
            self._turn.append(node)
        self._places[node] = self._socket_to(place), place

    def _socket_to(self, place: tuple[str, int]) -> socket.socket:
        family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing, but finds the route
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
        """Ask the nodes that are due and wanted; the question also tells a node that it still belongs to the run."""
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
        """Make all nodes due now.

        With many nodes, the first ones are asked at once and the others at the usual rate.
        """
        self._last -= self._every

    def answers(self, now: float) -> Iterator[tuple[str, int]]:
        """Yield each node that answered its last question since the previous call, with the number of that question."""
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
