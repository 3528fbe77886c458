"""Links of the fault benchmark: data that a host sends over a cut link stays unacknowledged on this host."""

import contextlib
import os
import socket
import time
from collections.abc import Callable

import pytest

from bench.fault_links import NETWORK, LinkedHosts
from bench.hosts import missing
from cluster.stacks import unanswered


@pytest.mark.hosts
def test_a_cut_link_is_seen_in_what_the_kernel_says_of_a_process(tmp_path):
    if why := missing():
        pytest.skip(why)
    child = os.fork()
    if child == 0:  # leaves the network of this process
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        os._exit(0 if _cut_and_look(tmp_path) else 1)
    assert os.waitpid(child, 0)[1] == 0


def _cut_and_look(folder) -> bool:
    hosts = LinkedHosts(2, {1: "link_cut"}, folder)
    hosts.enter(1)
    server = socket.create_server((f"{NETWORK}.2", 5000))
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    hosts.enter(0)
    client, full = (socket.create_connection((f"{NETWORK}.2", 5000), 5) for _ in range(2))
    there, _kept = server.accept()[0], server.accept()
    full.setblocking(False)
    with contextlib.suppress(BlockingIOError):  # nobody reads it, which is no matter of the link
        while full.send(bytes(1 << 16)):
            pass
    says = f"Sent from {NETWORK}.1 and not acknowledged by: "
    client.sendall(b"before")
    before = there.recv(6) == b"before" and _comes(lambda: unanswered(os.getpid()) == f"{says}\n")
    (folder / "struck_1").write_text("now")

    def is_seen() -> bool:
        client.sendall(b"behind")  # what the relay still takes before it has looked is acknowledged
        time.sleep(0.2)
        return unanswered(os.getpid()) == f"{says}{NETWORK}.2\n"

    return before and _comes(is_seen)


def _comes(check: Callable[[], bool]) -> bool:
    """Whether it is so at some time: processes of a busy machine wait for a core, and what arrives is acknowledged later."""
    end = time.monotonic() + 20
    while not (good := check()) and time.monotonic() < end:
        time.sleep(0.05)
    return good
