"""The store where ranks of several nodes meet, and a stranger who finds its port."""

import json
import os
import pickle
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from bench.hosts import Hosts, missing
from cluster.interfaces import free_port
from cluster.place import Place
from conf.load import compose
from parallel.signed_store import SealedStore
from tests.ranks import run_processes
from tests.test_exchange import Bomb
from train.rank import start_process_group

SECRET = bytes(32)
ROOT = Path(__file__).parents[1]


def test_only_what_a_rank_wrote_under_this_key_is_read():
    plain = dist.HashStore()
    store = SealedStore(plain, SECRET)
    for value in (b"", b"\0value\xff", "text"):
        store.set("key", value)
        assert store.get("key") == (value.encode() if isinstance(value, str) else value)
    assert b"text" not in plain.get("key"), "a stranger learns no address"
    first = plain.get("key")
    store.set("key", "text")
    assert plain.get("key") != first, "nor whether two values are equal"
    for bad in (b"", b"short", pickle.dumps(Bomb()), first[:-1] + bytes([first[-1] ^ 1]), b"\1" + first[1:]):
        plain.set("key", bad)
        with pytest.raises(PermissionError, match=r"key in the rendezvous store was not written by a rank"):
            store.get("key")
    plain.set("other", first)
    with pytest.raises(PermissionError, match="other"):
        store.get("other")
    SealedStore(plain, bytes([1] * 32)).set("key", "of another attempt")
    with pytest.raises(PermissionError):
        store.get("key")
    assert not hasattr(sys, "exploded")


def test_torch_reaches_every_method_through_its_own_stores():
    store = dist.PrefixStore("a", SealedStore(dist.HashStore(), SECRET))
    copy = store.clone()
    copy.set("key", b"value")
    store.wait(["key"])
    store.wait(["key"], timedelta(seconds=1))
    assert store.get("key") == b"value" and store.check(["key"]) and not store.check(["other"])
    assert store.add("count", 2) == 2 and copy.add("count", 1) == 3
    assert store.delete_key("key") and not store.check(["key"])


def check_sealed_group(rank: int, port: int) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "SLUICE_STORE_SECRET": SECRET.hex(),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    start_process_group(compose(), Place(rank, 2, rank, 2), torch.device("cpu"))
    assert "SLUICE_STORE_SECRET" not in os.environ, "children of the rank must not have it"
    total = torch.ones(1)
    dist.all_reduce(total, group=dist.new_group([0, 1]))
    assert total.item() == 2
    heard = {c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"}
    assert heard == {"127.0.0.1"}, "neither the store nor gloo listens elsewhere"
    dist.destroy_process_group()


def test_ranks_meet_in_it_and_listen_on_their_own_address():
    run_processes(check_sealed_group, free_port("127.0.0.1"))


class Toy:
    """Ranks of tests/stranger.py, and the stranger, each started by its own command line prefix: on this machine or on hosts."""

    def __init__(self, folder: Path, prefixes: list[list[str]], addresses: list[str], interface: str):
        self.folder, self.prefixes, self.addresses, self.interface = folder, prefixes, addresses, interface
        self.port = free_port("127.0.0.1") if addresses[0] == "127.0.0.1" else 29501  # a new network has all ports free
        self.ranks: list[subprocess.Popen] = []

    def start(self, rank: int) -> None:
        given = {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": self.addresses[0],
            "MASTER_PORT": str(self.port),
            "SLUICE_STORE_SECRET": SECRET.hex(),
            "GLOO_SOCKET_IFNAME": self.interface,
        }
        self.ranks.append(self._python(rank, given, "rank", str(self.folder)))

    def _python(self, place: int, given: dict[str, str], *words: str) -> subprocess.Popen:
        command = [*self.prefixes[place], sys.executable, "-m", "tests.stranger", *words]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | given, **streams)

    def strange(self) -> dict:
        """Let the stranger do what he can; returns what he saw."""
        self._find_port()
        stranger = self._python(2, {}, "join", self.addresses[0], str(self.port), str(self.folder / "mark"))
        said, _ = stranger.communicate(timeout=60)
        assert stranger.returncode == 0, said
        return json.loads(said.splitlines()[-1])

    def _find_port(self) -> None:
        """In /proc/net/tcp, as any user of the host of rank 0 may; only there does it listen, on that host's own address."""
        wanted = f":{self.port:04X}"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            lines = Path(f"/proc/{self.ranks[0].pid}/net/tcp").read_text().splitlines()[1:]
            heard = [line.split()[1] for line in lines if line.split()[3] == "0A" and line.split()[1].endswith(wanted)]
            if heard:
                assert heard == [socket.inet_aton(self.addresses[0])[::-1].hex().upper() + wanted]
                return
            assert self.ranks[0].poll() is None, self.ranks[0].communicate()
            time.sleep(0.05)
        raise AssertionError("rank 0 opened no store")

    def wait_for_step(self, rank: int, step: int) -> None:
        path, deadline = self.folder / f"step_{rank}", time.monotonic() + 60
        while not (path.exists() and int(path.read_text() or 0) >= step):
            if any(process.poll() is not None for process in self.ranks):
                return
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def end(self) -> list[tuple[int, str]]:
        """Exit code and output of every rank."""
        (self.folder / "end").touch()
        said = [process.communicate(timeout=120)[0] for process in self.ranks]
        return [(process.returncode, text) for process, text in zip(self.ranks, said, strict=True)]

    def close(self) -> None:
        for process in self.ranks:
            process.kill()
            process.wait()


@pytest.fixture(params=["loopback", pytest.param("hosts", marks=[pytest.mark.hosts, pytest.mark.slow])])
def toy(request, tmp_path):
    """Two ranks and a stranger: three processes of this machine, or one on each of three hosts."""
    if request.param == "loopback":
        toy = Toy(tmp_path, [[]] * 3, ["127.0.0.1"] * 3, "lo")
        yield toy
        toy.close()
        return
    if why := missing():
        pytest.skip(why)
    with Hosts(tmp_path, ray=False) as hosts:
        toy = Toy(tmp_path, [hosts.command(i) for i in range(3)], [f"10.77.0.{i + 1}" for i in range(3)], "eth0")
        yield toy
        toy.close()


@pytest.mark.slow
def test_a_stranger_gets_no_place_in_the_run(toy):
    toy.start(0)
    saw = toy.strange()
    assert saw["keys"] and not saw["read"], "he learns no address"
    ((code, said),) = toy.end()
    assert code != 0 and "/1 in the rendezvous store was not written by a rank of this attempt" in said, said
    assert not (toy.folder / "mark").exists()


@pytest.mark.slow
def test_a_stranger_runs_no_code_in_a_run_that_is_complete(toy):
    toy.start(0)
    toy.start(1)
    toy.wait_for_step(1, 3)
    assert not toy.strange()["read"]
    toy.wait_for_step(1, int((toy.folder / "step_1").read_text()) + 5)
    for code, said in toy.end():
        error = "not written by a rank of this attempt" in said or "Connection closed by peer" in said
        assert (code == 0 and said.endswith("done\n")) or (code != 0 and error), said
    assert not (toy.folder / "mark").exists()


DRIVER = """
import sys
from pathlib import Path
from cluster.local import run_local
sys.exit(run_local([sys.executable, "-m", "tests.stranger", "rank", sys.argv[1]], 2, Path(sys.argv[1], "logs")))
"""


@pytest.mark.slow
def test_ranks_of_one_machine_meet_where_no_other_user_can_come(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], cwd=ROOT, env=environment)
    try:
        toy = Toy(tmp_path, [], ["127.0.0.1"], "lo")
        toy.ranks = [driver]
        toy.wait_for_step(1, 2)
        ranks = psutil.Process(driver.pid).children()
        store = Path(ranks[0].environ()["SLUICE_STORE"])
        assert store.exists() and store.parent.stat().st_mode & 0o777 == 0o700
        if os.geteuid() == 0:  # another user can be played
            stranger = subprocess.run(
                ["cat", str(store)], user=65534, group=65534, extra_groups=[], capture_output=True
            )
            assert b"Permission denied" in stranger.stderr
        heard = [c for rank in ranks for c in rank.net_connections("tcp") if c.status == "LISTEN"]
        assert heard and {c.laddr.ip for c in heard} == {"127.0.0.1"}, "gloo's own sockets, on loopback alone"
        (tmp_path / "end").touch()
        assert driver.wait(60) == 0
        assert not store.parent.exists()
    finally:
        driver.kill()  # its ranks die with it
