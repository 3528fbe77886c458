"""The copies in a node's memory: access needs a token, older attempts are refused, the size is limited, and old copies
are removed."""

import os
import shutil
import socket
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from cluster.driver.copies import Copies
from cluster.node import copy_store as memory
from cluster.node.copy_store import Peer, SetId, Store, folder_name, held, prune, sweep
from cluster.topology import Node, StageShape, place

FIRST, SECOND, THIRD = (SetId(1, step, 3).name for step in (5, 10, 15))
DATA = "rank_00001.safetensors"


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "sluice-0-aa-bb-n0", "secret", "127.0.0.1", lambda: 1)
    yield store
    store.close(remove=True)
    assert not store.folder.exists()


def peer(store: Store, token: str = "secret") -> Peer:
    return Peer(f"127.0.0.1:{store.port}", token, 60.0)


def test_what_is_put_can_be_read_in_parts(store, tmp_path):
    body = os.urandom(3 << 20)
    (tmp_path / DATA).write_bytes(body)
    (tmp_path / "rank_00001.json").write_text("{}")
    other = peer(store)
    other.put(FIRST, tmp_path / DATA, "")
    assert held(store.folder) == {}, "a part without its index is not whole"
    other.put(FIRST, tmp_path / "rank_00001.json", "")
    assert held(store.folder) == {FIRST: [1]} and (store.folder / FIRST / DATA).read_bytes() == body
    buffer = memoryview(bytearray(1000))
    assert other.read(FIRST, DATA, buffer, 12345) == 1000 and buffer == body[12345:13345]
    assert other.read(FIRST, DATA, buffer, len(body) - 10) == 10 and buffer[:10] == body[-10:]
    assert other.get(FIRST, "rank_00001.json") == b"{}"
    assert os.stat(store.folder).st_mode & 0o077 == 0, "nobody else may read the weights"


@pytest.mark.parametrize(
    ("token", "name", "file", "words"),
    [
        ("wrong", FIRST, DATA, "401"),
        ("", FIRST, DATA, "401"),
        ("secret", "..", DATA, "404"),
        ("secret", FIRST, "../../secret.json", "404"),
        ("secret", FIRST, DATA, "404 not stored here"),
    ],
)
def test_strangers_and_strange_paths_are_refused(store, tmp_path, token, name, file, words):
    with pytest.raises(OSError, match=words):
        peer(store, token).get(name, file)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("", "411"),
        ("Transfer-Encoding: chunked", "411"),
        ("Content-Length: many", "400"),
        ("Content-Length: -1", "400"),
        ("Content-Length: " + "9" * 5000, "400"),
    ],
)
def test_a_body_without_a_length_is_refused(store, headers, status, capfd):
    with socket.create_connection(("127.0.0.1", store.port), timeout=60) as connection:
        lines = [f"PUT /{FIRST}/{DATA} HTTP/1.1", "Authorization: Bearer secret", *filter(None, [headers])]
        connection.sendall("\r\n".join([*lines, "", "body"]).encode())
        assert connection.recv(100).startswith(f"HTTP/1.1 {status} ".encode())
    assert held(store.folder) == {} and not (store.folder / FIRST).exists()
    assert "Traceback" not in capfd.readouterr().err


def test_connections_without_the_token_are_few_and_short(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(memory, "CONNECTIONS", 8)
    monkeypatch.setattr(memory, "ADMISSION", 0.5)
    store = Store(tmp_path / "sluice-0-aa-bb-n0", "secret", "127.0.0.1", lambda: 1)
    (tmp_path / "rank_00001.json").write_text("{}")
    before = threading.active_count()
    idle = [socket.create_connection(("127.0.0.1", store.port), timeout=30) for _ in range(40)]
    try:
        for connection in idle[::2]:  # some say a little, and stop
            connection.sendall(b"GET / HTTP/1.1\r\nX-")
        with closing(peer(store)) as known:
            known.put(FIRST, tmp_path / "rank_00001.json", "")  # once those before it have had their time
            assert threading.active_count() <= before + 8
            assert all(connection.recv(1000)[:12] in (b"", b"HTTP/1.1 401") for connection in idle)
            time.sleep(1.0)
            assert known.get(FIRST, "rank_00001.json") == b"{}", "a connection with the token may pause"
    finally:
        for connection in idle:
            connection.close()
        store.close(remove=True)
    assert "Traceback" not in capfd.readouterr().err


def test_a_store_that_is_full_of_connections_closes(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CONNECTIONS", 1)
    store = Store(tmp_path / "sluice-0-aa-bb-n0", "secret", "127.0.0.1", lambda: 1)
    idle = [socket.create_connection(("127.0.0.1", store.port), timeout=30) for _ in range(3)]
    time.sleep(0.3)
    started = time.monotonic()
    store.close(remove=True)
    assert time.monotonic() - started < 5
    for connection in idle:
        connection.close()


def test_a_rank_of_an_old_attempt_changes_nothing(tmp_path):
    store = Store(tmp_path / "sluice-0-aa-bb-n0", "secret", "127.0.0.1", lambda: 2)
    (store.folder / SetId(2, 5, 2).name).mkdir()
    (tmp_path / DATA).write_bytes(b"old")
    with pytest.raises(OSError, match="409 attempt 1 is over"):
        peer(store).put(FIRST, tmp_path / DATA, "")
    prune(store.folder, {FIRST}, attempt=1)
    assert [path.name for path in store.folder.glob("attempt_*")] == [SetId(2, 5, 2).name]
    store.close(remove=True)


def test_a_node_keeps_the_whole_set_and_the_one_in_the_making(store, tmp_path):
    (tmp_path / DATA).write_bytes(b"x")
    for name, keep in ((FIRST, ""), (SECOND, FIRST), (THIRD, SECOND)):
        peer(store).put(name, tmp_path / DATA, keep)
    assert sorted(path.name for path in store.folder.glob("attempt_*")) == [SECOND, THIRD]


def test_a_full_disk_is_said_to_the_sender_and_leaves_no_part(store, tmp_path, monkeypatch):
    (tmp_path / DATA).write_bytes(b"x" * 100)

    def no_space(handle, view):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cluster.node.copy_store.os.write", no_space)
    with pytest.raises(OSError, match=r"507 .*No space left"):
        peer(store).put(FIRST, tmp_path / DATA, "")
    assert not list((store.folder / FIRST).iterdir())


def test_two_agents_cannot_hold_one_folder(store, monkeypatch):
    monkeypatch.setattr("cluster.node.copy_store._take_lock.__defaults__", (0.2,))
    with pytest.raises(BlockingIOError):
        Store(store.folder, "secret", "127.0.0.1", lambda: 1)


def test_left_overs_of_dead_agents_are_swept(tmp_path):
    mine = tmp_path / folder_name("run1", "id2", "n-0")
    others = {
        "before": folder_name("run1", "id1", "n-0"),
        "neighbour": folder_name("run1", "id1", "n1"),
        "other": folder_name("run2", "id1", "n-0"),
        "stale": folder_name("run3", "id1", "n-0"),
    }
    for name in [mine.name, *others.values()]:
        (tmp_path / name).mkdir()
        (tmp_path / name / ".lock").touch()
    yesterday = time.time() - 25 * 3600
    os.utime(tmp_path / others["stale"], (yesterday, yesterday))
    living = Store(tmp_path / folder_name("run1", "id0", "n-0"), "secret", "127.0.0.1", lambda: 1)
    sweep(mine)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {mine.name, others["neighbour"], others["other"], living.folder.name}
    living.close(remove=True)


def test_a_link_in_shared_memory_leads_nowhere(tmp_path):
    """Another user knows the name of the folder, and makes a link there to a folder of ours."""
    shared, ours = tmp_path / "shm", tmp_path / "precious"
    for folder in (shared, ours / FIRST):
        folder.mkdir(parents=True)
    (ours / ".lock").touch()
    yesterday = time.time() - 25 * 3600
    os.utime(ours, (yesterday, yesterday))
    mine = shared / folder_name("run1", "id1", "n0")
    mine.symlink_to(ours)
    with pytest.raises(PermissionError, match="is a link"):
        Store(mine, "secret", "127.0.0.1", lambda: 1)
    sweep(shared / folder_name("run1", "id2", "n0"))
    assert sorted(path.name for path in ours.iterdir()) == [".lock", FIRST] and mine.is_symlink()
    (shared / "lock").touch()
    folder = shared / folder_name("run1", "id3", "n0")
    folder.mkdir()
    (folder / ".lock").symlink_to(shared / "lock")
    with pytest.raises(OSError, match="symbolic links"):
        Store(folder, "secret", "127.0.0.1", lambda: 1)


def test_a_folder_that_was_open_to_others_is_closed_to_them(tmp_path):
    folder = tmp_path / folder_name("run1", "id1", "n0")
    folder.mkdir(mode=0o755)
    Store(folder, "secret", "127.0.0.1", lambda: 1).close(remove=False)
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("found", [None, "0123abcd", "", "../../x", "/etc", "0123abcd\n"])
def test_the_number_in_the_names_of_copies_is_hidden_and_no_path(tmp_path, found):
    path = tmp_path / "attempts" / "memory_id"
    if found is not None:
        path.parent.mkdir()
        path.write_text(found)
        path.chmod(0o644)
    folder = Path(Copies(tmp_path, "/dev/shm", first=1).folder_on(Node("id0", "n0", "10.0.0.1", 1)))
    assert path.stat().st_mode & 0o777 == 0o600
    assert folder.parent == Path("/dev/shm") and path.read_text() in folder.name
    assert (path.read_text() == found) == (found == "0123abcd")


def test_the_newest_set_is_whole_on_the_nodes_that_answer(tmp_path):
    nodes = {f"id{i}": Node(f"id{i}", f"n{i}", f"10.0.0.{i}", 1) for i in range(3)}
    copies = Copies(tmp_path, "/dev/shm", first=2)
    for i, node in enumerate(nodes.values()):
        copies.note_port(node.id, 1000 + i)
        copies.take(node.id, {FIRST: [i, (i - 1) % 3], SECOND: [i] if i else [0, 2]})
    assert copies.newest(nodes) == SetId(1, 10, 3)
    assert copies.newest(["id0", "id1"]) == SetId(1, 10, 3) and copies.newest(["id1", "id2"]) == SetId(1, 5, 3)
    copies.forget("id0")
    left = {id: node for id, node in nodes.items() if id != "id0"}
    placement = place(list(left.values())[:1], 1, [StageShape(1, 1)])
    shelves = copies.shelves(placement, left, full_size=False, auto=True)
    assert shelves.resume == FIRST and shelves.holders == [[0], [0, 1], [1]]
    assert [shelf.ranks for shelf in shelves.nodes] == [[0], []] and shelves.next(0) is None
    assert copies.shelves(placement, left, False, auto=False).resume is None, "an earlier launch wrote it"
    again = Copies(tmp_path, "/dev/shm", first=2)
    assert again.folder_on(nodes["id1"]) == copies.folder_on(nodes["id1"]), "a new launch finds the copies"
    shutil.rmtree(tmp_path / "attempts")
    anew = Copies(tmp_path, "/dev/shm", first=1)
    assert anew.folder_on(nodes["id1"]) != copies.folder_on(nodes["id1"]), "a removed run leaves none behind"
