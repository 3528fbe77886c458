"""The driver's side of the pulse: asks every node by UDP whether it lives (cluster/node/pulse_echo.py).

A node that answers here need not be asked through Ray so often. Where no datagram comes through, it is, as before.
"""

import collections
import secrets
import socket
from collections.abc import Callable, Iterator

from cluster.node.pulse_echo import ANSWER, LONGEST_DATAGRAM, QUESTION, seal_datagram, unseal

QUESTION_TRIES = 5
"""Questions to a node within a heartbeat, at least."""
OFTEN = 1.0
"""Seconds between questions to a node, at most: a few shall come before a probe is over (cluster/driver/policy.py)."""
QUESTIONS_AT_ONCE = 200
"""Questions, so that their answers find room in the socket's buffer."""


class Pulse:
    """Call `ask` and `answers` often. heartbeat: seconds for which an answer counts."""

    def __init__(self, heartbeat: float):
        self.key = secrets.token_bytes(32)
        self._heartbeat, self._every = heartbeat, min(heartbeat / QUESTION_TRIES, OFTEN)
        self._sockets: dict[str, socket.socket] = {}
        """By the address of this machine from which nodes are asked."""
        self._places: dict[str, tuple[socket.socket, tuple[str, int]]] = {}
        self._turn: collections.deque[str] = collections.deque()
        """Nodes in the order in which they are asked; also some that were forgotten."""
        self._asked: dict[str, int] = {}
        """Number of the question that a node was asked last."""
        self._heard: dict[str, float] = {}
        self.number = 0
        """Number of the newest question to any node."""
        self._last = 0.0

    def know(self, node: str, place: tuple[str, int] | None) -> None:
        """From now on ask this node there; place: as cluster/node/pulse_echo.py has it, None for a node without."""
        if place is None:
            return
        if node not in self._places:
            self._turn.append(node)
        self._places[node] = self._socket_to(place), place

    def _socket_to(self, place: tuple[str, int]) -> socket.socket:
        family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing, but finds the way there
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
        """Whether the node answered lately."""
        return now - self._heard.get(node, -self._heartbeat) < self._heartbeat

    def ask(self, now: float, wanted: Callable[[str], bool]) -> None:
        """Ask those whose turn it is, if they are wanted: the question also tells a node that it still belongs to the run."""
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
                except OSError:  # the link is down, or the queue full; the next one may come through
                    continue

    def hurry(self) -> None:
        """Make it everybody's turn; of many the first ones are asked at once, and the others as ever."""
        self._last -= self._every

    def answers(self, now: float) -> Iterator[tuple[str, int]]:
        """Nodes that answered the last question since the last call, and its number."""
        for way in self._sockets.values():
            while True:
                try:
                    datagram = way.recv(LONGEST_DATAGRAM)
                except OSError:  # nothing is there, or the link is down
                    break
                told = unseal(self.key, ANSWER, datagram)
                if told is not None and self._asked.get(told[1]) == told[0]:
                    del self._asked[told[1]]
                    self._heard[told[1]] = now
                    yield told[1], told[0]

    def close(self) -> None:
        for way in self._sockets.values():
            way.close()
