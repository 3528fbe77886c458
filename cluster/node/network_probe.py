"""A node's part of the network test (cluster/driver/network.py): an echo server and measurements."""

import socket
import threading
import time
from dataclasses import dataclass

PINGS = 10
BYTES = 4 << 20
PAIR_SECONDS = 5.0
"""Maximum seconds for the test of one connection."""


@dataclass(frozen=True)
class NodeLink:
    """Result of the measurement from one node to another."""

    address: str
    milliseconds: float = 0.0
    """Shortest round-trip time of one byte."""
    gbit: float = 0.0
    """Bandwidth of a single stream in gigabits per second."""
    error: str | None = None


class NetworkProbe:
    """Runs the network test on a node: an echo server, and measurements to other nodes."""

    def __init__(self) -> None:
        self._server: socket.socket | None = None
        self._served = threading.Semaphore(0)
        """Number of ended measurements by other nodes. `play` waits until it is above 0, and reduces it by 1."""

    def listen(self, address: str) -> int:
        """Start the server on this address. Returns its port."""
        self.close()
        self._server = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        threading.Thread(target=self._serve, args=(self._server,), daemon=True).start()
        return self._server.getsockname()[1]

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown(socket.SHUT_RDWR)
            self._server.close()
            self._server = None

    def play(self, turns: list[tuple[str, int] | None]) -> list[NodeLink]:
        """Measure the connections to other nodes one after another.

        turns: address and port of each server, or None to wait until another node has measured this node. A turn takes
        at most about PAIR_SECONDS.
        """
        found = []
        for turn in turns:
            if turn is None:
                self._served.acquire(timeout=PAIR_SECONDS)
            else:
                found.append(measure(*turn))
        return found

    def _serve(self, server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:  # the server is closed
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        """Echo the bytes of the latency test, then receive and confirm the data of the bandwidth test."""
        with connection:
            connection.settimeout(PAIR_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                for _ in range(PINGS):
                    connection.sendall(connection.recv(1))
                left = BYTES
                while left and (piece := connection.recv(1 << 20)):
                    left -= len(piece)
                connection.sendall(b"!")
            except OSError:  # the other node reports the error
                return
        self._served.release()


def measure(address: str, port: int) -> NodeLink:
    """Return latency and bandwidth of the connection to a listening NetworkProbe."""
    try:
        with socket.create_connection((address, port), timeout=PAIR_SECONDS) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            times = []
            for _ in range(PINGS):
                started = time.perf_counter()
                connection.sendall(b".")
                connection.recv(1)
                times.append(time.perf_counter() - started)
            started = time.perf_counter()
            connection.sendall(bytes(BYTES))
            connection.recv(1)
            seconds = time.perf_counter() - started
    except OSError as error:
        return NodeLink(address, error=str(error))
    return NodeLink(address, min(times) * 1e3, BYTES * 8 / seconds / 1e9)
