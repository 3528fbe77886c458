"""Links of the benchmark of faults: what is sent over one that was cut is seen as not acknowledged, on the host that sent it."""

import contextlib
import os
import socket
import time

import pytest

from bench.fault_links import NETWORK, LinkedHosts
from cluster.drill.hosts import missing
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
    time.sleep(0.5)
    client.sendall(b"before")
    before = there.recv(6), unanswered(os.getpid())
    (folder / "struck_1").write_text("now")
    time.sleep(0.2)
    client.sendall(b"behind")
    time.sleep(0.2)
    says = f"Sent from {NETWORK}.1 and not acknowledged by: "
    return before == (b"before", f"{says}\n") and unanswered(os.getpid()) == f"{says}{NETWORK}.2\n"
