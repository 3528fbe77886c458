"""The pulse: both sides on loopback, and packets from unknown senders."""

import socket
import time
from collections.abc import Iterator

import pytest

from cluster.driver.pulse_sender import Pulse
from cluster.node.pulse_echo import ANSWER, QUESTION, Echo, seal_datagram, unseal

KEY = b"k" * 32


class Node:
    """Its echo, and how often it was asked."""

    def __init__(self, id: str, key: bytes):
        self.asked = 0
        self.echo = Echo(id, "127.0.0.1", key, self._count)

    def _count(self) -> None:
        self.asked += 1


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node("id1", KEY)
    yield node
    node.echo.close()


def send(node: Node, *datagrams: bytes, last: int) -> list[bytes]:
    """What comes back, up to the answer to a question of this number behind them: they are taken in their order."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.settimeout(60)
        for datagram in (*datagrams, seal_datagram(KEY, QUESTION, last, "id1")):
            way.sendto(datagram, node.echo.place)
        found = [way.recv(512)]
        while found[-1] != seal_datagram(KEY, ANSWER, last, "id1"):
            found.append(way.recv(512))
        return found[:-1]


def test_a_question_is_answered_once_and_only_to_who_has_the_key(node):
    question = seal_datagram(KEY, QUESTION, 7, "id1")
    assert send(node, question, question, last=8) == [seal_datagram(KEY, ANSWER, 7, "id1")]
    old, other = seal_datagram(KEY, QUESTION, 6, "id1"), seal_datagram(KEY, QUESTION, 9, "id2")
    strangers = [seal_datagram(b"s" * 32, QUESTION, 10, "id1"), seal_datagram(KEY, ANSWER, 10, "id1"), b"", b"x" * 400]
    assert send(node, old, other, *strangers, last=11) == [] and node.asked == 3
    assert unseal(KEY, QUESTION, question) == (7, "id1") and unseal(KEY, ANSWER, question) is None


def hear(pulse: Pulse, count: int, now: float) -> list[tuple[str, int]]:
    """So many answers, and those that are there with them."""
    found, deadline = [], time.monotonic() + 60
    while len(found) < count and time.monotonic() < deadline:
        found += pulse.answers(now)
    return found


def test_a_driver_hears_the_nodes_that_it_asks_and_no_others():
    pulse = Pulse(heartbeat=5.0)
    nodes = {id: Node(id, pulse.key) for id in ("id1", "id2", "id3")}
    for id, node in nodes.items():
        pulse.know(id, node.echo.place)
    pulse.know("id4", None)
    pulse.ask(100.0, lambda id: id != "id3")
    heard = hear(pulse, 2, 100.1)
    assert sorted(heard) == [("id1", 1), ("id2", 2)] and pulse.number == 2 and nodes["id3"].asked == 0
    assert pulse.hears("id1", 104.0) and not pulse.hears("id1", 106.0) and not pulse.hears("id4", 100.1)
    nodes["id2"].echo.close()
    while nodes["id2"].echo._socket.fileno() >= 0:  # it looks every half second whether it is closed
        time.sleep(0.01)
    pulse.forget("id1")
    pulse.ask(200.0, lambda id: True)
    assert hear(pulse, 1, 200.1) == [("id3", 4)] and nodes["id1"].asked == 1
    pulse.ask(200.1, lambda id: True)
    assert pulse.number == 4, "it is nobody's turn"
    pulse.hurry()
    pulse.ask(200.1, lambda id: True)
    assert pulse.number == 6
    pulse.close()
    for node in nodes.values():
        node.echo.close()


def test_a_forged_answer_is_no_answer():
    pulse, node = Pulse(heartbeat=5.0), Node("id1", KEY)  # a key of its own: it does not answer
    pulse.know("id1", node.echo.place)
    pulse.ask(100.0, lambda id: True)
    (way,) = pulse._sockets.values()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        for answer in (
            seal_datagram(KEY, ANSWER, 1, "id1"),
            seal_datagram(pulse.key, ANSWER, 2, "id1"),
            b"",
            b"x" * 400,
        ):
            stranger.sendto(answer, way.getsockname())
        assert list(pulse.answers(100.1)) == []
        stranger.sendto(seal_datagram(pulse.key, ANSWER, 1, "id1"), way.getsockname())
        stranger.sendto(seal_datagram(pulse.key, ANSWER, 1, "id1"), way.getsockname())
        assert list(pulse.answers(100.2)) == [("id1", 1)]
    pulse.close()
    node.echo.close()
