"""No process outlives a driver and its Ray, even if no init process reaps the dead, as in a container whose first
process is the command."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.driver.journal import read_events
from cluster.spawn import lives
from conf.errors import EXIT_OK
from tests.cluster.drive import hold, let_end

pytestmark = [pytest.mark.hosts, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
FIRST_PROCESS = """
import json, os, sys, time
for line in sys.stdin:
    words, log = json.loads(line)
    if os.fork() == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.execvp(words[0], words)
time.sleep(1000)
"""


class Container:
    """Process ids of its own, whose first process starts what it is told to and reaps nobody."""

    def __init__(self):
        words = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c", FIRST_PROCESS]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, text=True, cwd=ROOT)

    def start(self, words: list[str], log: Path) -> None:
        print(json.dumps([words, str(log)]), file=self._process.stdin, flush=True)

    def processes(self, word: str) -> list[psutil.Process]:
        """Those with this word in their command line; a zombie has none."""
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            try:
                if word in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def container():
    if os.geteuid() or not shutil.which("unshare") or subprocess.run(["unshare", "--pid", "--fork", "true"]).returncode:
        pytest.skip("process ids of one's own need root and unshare")
    container = Container()
    yield container
    container.close()


def test_a_killed_driver_and_raylet_leave_no_agent_and_the_node_is_taken_again_at_once(container, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    (tmp_path / "memory").mkdir()
    words = [sys.executable, "-m", "tests.cluster.drive", str(tmp_path), "parallel.dp=2", "steps=10"]
    words += ["checkpoint.every=5", "checkpoint.every_memory=5", f"checkpoint.memory_folder={tmp_path / 'memory'}"]

    def await_event(kind: str, seen: int = 0) -> dict:
        deadline = time.monotonic() + 120
        while not (found := [event for event in read_events(folder)[seen:] if event["kind"] == kind]):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        return found[0]

    hold(folder)
    container.start(words, log)
    await_event("checkpoint")
    seen = len(read_events(folder))
    (driver, *_), (raylet, *_) = container.processes("tests.cluster.drive"), container.processes("/raylet/raylet")
    left = [*container.processes("ray::Agent"), *container.processes("fake_rank.py")]
    assert len(left) == 3, left
    raylet.send_signal(signal.SIGKILL)
    driver.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while (still := [process for process in left if lives(process.pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not still
    let_end(folder)
    container.start(words, log)
    assert await_event("finish", seen)["code"] == EXIT_OK, log.read_text()
    assert not [event for event in read_events(folder)[seen:] if event["kind"] in ("node_refused", "failure")]
