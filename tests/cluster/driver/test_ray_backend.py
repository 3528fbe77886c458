"""A run that starts Ray on this machine: fake ranks run through the complete path, and bad input is refused before
it."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import psutil
import pytest

from cluster.driver import ray_backend
from cluster.driver.fleet import FleetLost
from cluster.driver.journal import read_events
from cluster.driver.ray_backend import MOST_OUT, RayFleet
from cluster.spawn import lives
from cluster.topology import Node
from conf.errors import EXIT_CRASH, EXIT_OK, EXIT_USER, UserError
from tests.cluster.drive import find_event, hold, let_end, once, set_fault

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_a_run_on_its_own_ray_survives_a_killed_rank_and_listens_on_loopback_alone(tmp_path):
    folder = tmp_path / "run"
    words = [
        sys.executable,
        "-m",
        "tests.cluster.drive",
        str(tmp_path),
        "parallel.dp=2",
        "steps=10",
        "checkpoint.every=5",
    ]
    hold(folder)
    with (tmp_path / "out").open("w") as out:
        driver = subprocess.Popen(words, cwd=ROOT, stdout=out, stderr=out)
    try:
        while find_event(folder, "checkpoint") is None:
            assert driver.poll() is None, (tmp_path / "out").read_text()
            time.sleep(0.1)
        assert {rank.nice() for rank in ranks_of(driver.pid)} == {psutil.Process().nice()}, "Ray's default is 15"
        assert listening_addresses(driver.pid) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        private = folder_of_ray(driver.pid)
        assert private.stat().st_mode & 0o777 == 0o700, "Ray opens its sockets and files in there to everybody"
        set_fault(folder, 1, "kill")
        once(folder, lambda: let_end(folder), "recovered")
        assert driver.wait(120) == EXIT_OK, (tmp_path / "out").read_text()
    finally:
        driver.kill()
    assert not private.exists()
    events = read_events(folder)
    assert [event["dp"] for event in events if event["kind"] == "attempt"] == [2, 2]
    (failure,) = [event for event in events if event["kind"] == "failure"]
    assert failure["ranks"] == [1] and "SIGKILL" in failure["text"]
    assert "rank 0 of 2 resumes at" in (folder / "logs" / "rank_0.log").read_text()


@pytest.fixture
def trains(tmp_path):
    """A driver whose run on its own Ray has a checkpoint, its folder, and all processes that it has started."""
    folder = tmp_path / "run"
    words = ["-m", "tests.cluster.drive", str(tmp_path), "parallel.dp=2", "steps=10", "checkpoint.every=5"]
    hold(folder)
    with (tmp_path / "out").open("w") as out:
        driver = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=out, stderr=out)
    try:
        while find_event(folder, "checkpoint") is None:
            assert driver.poll() is None, (tmp_path / "out").read_text()
            time.sleep(0.1)
        yield driver, folder, psutil.Process(driver.pid).children(recursive=True)
    finally:
        driver.kill()
        driver.wait()


@pytest.mark.slow
def test_a_killed_driver_leaves_no_process_and_no_folder_of_its_ray(trains):
    driver, _, started = trains
    private = folder_of_ray(driver.pid)
    left = [process for process in started if not any("sweep_ray" in word for word in process.cmdline())]
    driver.kill()
    ends = time.monotonic() + 30
    while private.exists() or (still := [process for process in left if lives(process.pid)]):
        assert time.monotonic() < ends, (private.exists(), still)
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_raylet_ends_the_run_at_once_and_no_node_is_waited_for(trains, tmp_path):
    driver, folder, started = trains
    (raylet,) = [process for process in started if process.name() == "raylet"]
    raylet.kill()
    began = time.monotonic()
    assert driver.wait(50) == EXIT_CRASH and time.monotonic() - began < 45, "cluster.wait has 60 s"
    said = (tmp_path / "out").read_text()
    assert (
        "the Ray that this run started on this machine has ended, and it cannot be replaced by another node" in said
    ), said
    assert re.search(r"newest checkpoint: step [0-9]+", said) and "add nodes" not in said
    assert find_event(folder, "finish", code=EXIT_CRASH)


def ranks_of(pid: int) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [process] if any("fake_rank" in word for word in process.cmdline()) else []
    assert found
    return found


def folder_of_ray(pid: int) -> Path:
    """The folder around all that Ray's processes were told to use."""
    lines = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            lines.append(" ".join(process.cmdline()))
    (raylet,) = [line for line in lines if "/raylet/raylet " in line]
    found = {Path(name).parent for name in re.findall(r"=(/\S+/ray)/session_", raylet)}
    assert len(found) == 1, raylet
    return found.pop()


def listening_addresses(pid: int) -> set[str]:
    """Addresses on which this process and all its descendants accept connections."""
    found = set()
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            sockets = process.net_connections(kind="inet")
            found |= {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN}
    assert found, "Ray must listen somewhere"
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "environment", "words"),
    [
        (["cluster.address=127.0.0.1:1"], {"RAY_AUTH_TOKEN": "x" * 64}, "must be HOST:PORT of a running Ray"),
        (["cluster.address=nowhere"], {"RAY_AUTH_TOKEN": "x" * 64}, "must be HOST:PORT of a running Ray"),
        (["cluster.address=127.0.0.1:1"], {"HOME": "/nonexistent"}, "must require a token"),
    ],
)
def test_no_ray_and_no_token_are_refused_soon(tmp_path, overrides, environment, words):
    started = time.monotonic()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    words_of = [sys.executable, "-m", "tests.cluster.drive", str(tmp_path), *overrides]
    result = subprocess.run(words_of, cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=180)
    assert result.returncode == EXIT_USER, result.stderr
    assert words in result.stderr and "Traceback" not in result.stderr
    assert (
        time.monotonic() - started < 60
    )  # to import Ray may take 20 s beside other tests; Ray itself would look for a head for minutes


class BusyRay:
    """Of a machine where it comes up late: init fails that often, and leaves a process behind."""

    def __init__(self, failures: int):
        self.failures, self.folders, self.left = failures, [], []

    def init(self, _temp_dir: str, **_: object) -> None:
        self.folders.append(Path(_temp_dir).parent)
        if len(self.folders) <= self.failures:
            words = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", _temp_dir]
            self.left.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            self.left[-1].stdout.readline()
            raise Exception(
                "The current node timed out during startup. This could happen because\nthe GCS is overloaded."
            )

    def shutdown(self) -> None:
        pass


def start_on(ray: BusyRay) -> RayFleet:
    fleet = RayFleet.__new__(RayFleet)
    fleet._ray = ray
    fleet._start_embedded()
    return fleet


def test_a_ray_that_does_not_come_up_is_started_once_more(capfd):
    ray = BusyRay(failures=1)
    fleet = start_on(ray)
    first, second = ray.folders
    assert not first.exists() and second.exists() and second == fleet._folder.path
    assert ray.left[0].wait(60) == -signal.SIGKILL
    assert "could not be started on this machine (The current node timed out" in capfd.readouterr().err
    fleet._folder.remove()


def test_a_ray_that_does_not_come_up_twice_is_one_screen_with_the_cure():
    ray = BusyRay(failures=2)
    with pytest.raises(UserError, match="cluster = ray") as caught:
        start_on(ray)
    assert caught.value.code == EXIT_CRASH and "in two attempts: The current node timed out" in caught.value.rule
    assert "cluster=local" in caught.value.cure and "\nthe GCS" not in caught.value.rule
    assert not any(folder.exists() for folder in ray.folders)
    assert [process.wait(60) for process in ray.left] == [-signal.SIGKILL] * 2


@pytest.fixture
def silent_head(monkeypatch):
    """A fleet whose head takes connections, and lists its nodes once the event is set."""
    monkeypatch.setattr(ray_backend, "HEAD_LIMIT", 0.1)
    monkeypatch.setattr(ray_backend, "CONNECT_LIMIT", 0.5)
    fleet, goes_on = RayFleet.__new__(RayFleet), threading.Event()
    fleet._look, fleet._listed, fleet._leaving, fleet._headless = None, [], {}, False
    fleet._head_seen = time.monotonic()
    fleet._list, fleet._list_draining = lambda: goes_on.wait(60) and ["n0"], lambda: {"id0": "preempted"}
    with socket.create_server(("127.0.0.1", 0)) as head:
        fleet._head = f"127.0.0.1:{head.getsockname()[1]}"
        assert fleet.nodes() == [] and fleet.draining() == {}
        yield fleet, goes_on


def test_a_head_that_hangs_once_it_has_answered_is_named_and_holds_nobody_up(silent_head):
    fleet, goes_on = silent_head
    with pytest.raises(FleetLost, match="so the nodes are unknown"):
        while True:
            fleet.nodes()
    goes_on.set()
    fleet._look.result(60)
    assert fleet.nodes() == ["n0"] and fleet.draining() == {"id0": "preempted"}


def test_a_driver_that_was_held_up_hears_a_head_that_has_answered_meanwhile(silent_head, monkeypatch):
    monkeypatch.setattr(ray_backend, "HEAD_LIMIT", 60)
    fleet, goes_on = silent_head
    fleet._look_began -= 3600
    threading.Timer(0.2, goes_on.set).start()
    assert fleet.nodes() == ["n0"] and fleet.draining() == {"id0": "preempted"}


class Actor:
    """Of one node: notes its calls, which end when the test says so."""

    def __init__(self, made: list[Future]):
        self._made = made

    def __getattr__(self, method: str):
        outcome = Future()
        made = SimpleNamespace(remote=lambda: self._made.append(outcome) or SimpleNamespace(future=lambda: outcome))
        return SimpleNamespace(options=lambda concurrency_group: made)


def test_thousands_of_calls_go_out_in_turns_and_nodes_that_do_not_answer_hold_up_no_others():
    fleet, made = RayFleet.__new__(RayFleet), []
    fleet._next, fleet._out, fleet._taken, fleet._done = deque(), 0, 0, SimpleQueue()
    fleet._actors = {f"id{i}": Actor(made) for i in range(2000)}
    for node in fleet._actors:
        fleet.call(node, "probe")
    for _ in range(12):
        assert fleet.replies(0.0) == []
    assert MOST_OUT <= len(made) < 2 * MOST_OUT
    silent, heard = made[:MOST_OUT], 0
    for _ in range(100):
        for outcome in made[MOST_OUT:]:
            if not outcome.done():
                outcome.set_result(None)
        heard += len(fleet.replies(0.0))
    assert len(made) == 2000 and heard == 2000 - MOST_OUT and not any(outcome.done() for outcome in silent)


@pytest.mark.parametrize(("named", "label"), [(set(), ""), ({"id7"}, ",train/node=n7")])
def test_a_node_that_was_listed_as_dead_is_told_the_command_that_brings_it_back(named, label):
    fleet = RayFleet.__new__(RayFleet)
    fleet._config, fleet._head, fleet._named = (
        SimpleNamespace(cluster=SimpleNamespace(address="h:1")),
        "10.0.0.1:6379",
        named,
    )
    text = fleet.describe_return(Node("id7", "n7", "10.0.0.7", 8, "r1"))
    assert f"`ray start --address=10.0.0.1:6379 --labels=train/rack=r1{label}`" in text
    fleet._config.cluster.address = None
    assert fleet.describe_return(Node("id7", "n7", "10.0.0.7", 8)) == "", "a Ray of the run's own goes with it"
