"""A node that leaves waits for what runs there, not for what has ended."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster import leave
from conf.errors import EXIT_OK


def zombie(words: list[str]) -> subprocess.Popen:
    """A process that has ended and whose exit code nobody fetches for now."""
    process = subprocess.Popen(words)
    deadline = time.monotonic() + 30
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.01)
    return process


@pytest.mark.hosts
@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root")
def test_a_raylet_of_a_container_with_the_same_address_is_not_of_this_host(tmp_path):
    stands_in = shutil.copy(os.path.realpath(shutil.which("sh")), tmp_path / "raylet")
    ended = zombie([stands_in, "-c", "exit"])
    words = [stands_in, "-c", "echo; read line", "sh", "--node-ip-address=127.0.0.1", "--gcs-address=127.0.0.1:1"]
    here, elsewhere = (
        subprocess.Popen(
            [*before, *words, f"--node-id={tmp_path}/{name}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for name, before in (("here", []), ("elsewhere", ["unshare", "--net"]))
    )
    try:
        for process in (here, elsewhere):
            process.stdout.readline()  # it runs by its name
        found = {Path(node).name for _, node, _ in leave.raylets() if node.startswith(str(tmp_path))}
        assert found == {"here"}
    finally:
        for process in (here, elsewhere):
            process.communicate()
        ended.wait()


def test_a_zombie_counts_as_gone(monkeypatch):
    raylet = zombie([sys.executable, "-c", "pass"])
    process = psutil.Process(raylet.pid)
    assert process.is_running(), "psutil counts a zombie as running"
    monkeypatch.setattr(leave, "raylets", lambda: [(process, "id", "127.0.0.1:1")])
    told = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(leave.subprocess, "run", lambda *_, **__: told)
    began = time.monotonic()
    assert leave.main(["--within", "60"]) == EXIT_OK
    assert time.monotonic() - began < 20
    raylet.wait()
