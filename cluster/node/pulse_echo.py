"""A node's part of the pulse: it answers the driver's UDP questions (cluster/driver/pulse_sender.py).

About once a second, the driver asks whether a node is alive. A call through Ray would take much longer. Datagrams are
signed with a key of this launch. The driver ignores answers to older questions.
"""

import contextlib
import hmac
import socket
import struct
import threading
from collections.abc import Callable

SEAL = 16
"""Number of bytes of the signature in a datagram."""
NUMBER = struct.Struct("!cQ")
QUESTION, ANSWER = b"?", b"!"
LONGEST_DATAGRAM = 512
"""Maximum bytes of a datagram; a node's id is much shorter."""
END_LOOK_SECONDS = 0.5
"""Seconds after which the thread checks again whether it must end."""


def seal_datagram(key: bytes, kind: bytes, number: int, node: str) -> bytes:
    """Return a signed datagram: a question to this node, or its answer."""
    word = NUMBER.pack(kind, number) + node.encode()
    return hmac.digest(key, word, "sha256")[:SEAL] + word


def unseal(key: bytes, kind: bytes, datagram: bytes) -> tuple[int, str] | None:
    """Return number and node id of a datagram; None for another kind or a wrong signature."""
    signed, word = datagram[:SEAL], datagram[SEAL:]
    if not hmac.compare_digest(signed, hmac.digest(key, word, "sha256")[:SEAL]) or word[:1] != kind:
        return None
    return NUMBER.unpack_from(word)[1], word[NUMBER.size :].decode()


class Echo:
    """A thread that answers the driver's questions until `close`, and calls `heard` for each question. Raises OSError
    for another machine's address.
    """

    def __init__(self, node: str, address: str, key: bytes, heard: Callable[[], None]):
        self._node, self._key, self._heard = node, key, heard
        self._socket = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        self._closed = threading.Event()
        try:
            self._socket.bind((address, 0))
        except OSError:
            self._socket.close()
            raise
        self._socket.settimeout(END_LOOK_SECONDS)
        self.place: tuple[str, int] = self._socket.getsockname()[:2]
        """Address and port of the socket."""
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        newest = 0
        with self._socket:
            while not self._closed.is_set():
                with contextlib.suppress(OSError):  # no question arrived, or the answer cannot be sent
                    datagram, driver = self._socket.recvfrom(LONGEST_DATAGRAM)
                    asked = unseal(self._key, QUESTION, datagram)
                    if asked is not None and asked[1] == self._node and asked[0] > newest:
                        newest = asked[0]
                        self._heard()
                        self._socket.sendto(seal_datagram(self._key, ANSWER, newest, self._node), driver)

    def close(self) -> None:
        self._closed.set()
