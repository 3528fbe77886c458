"""A node that leaves waits for what runs there, not for what has ended."""

import subprocess
import sys
import time

import psutil

from cluster import leave
from conf.errors import EXIT_OK


def test_a_zombie_counts_as_gone(monkeypatch):
    raylet = subprocess.Popen([sys.executable, "-c", "pass"])  # nobody fetches its exit code for now
    process = psutil.Process(raylet.pid)
    deadline = time.monotonic() + 30
    while process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.is_running(), "psutil counts a zombie as running"
    monkeypatch.setattr(leave, "raylets", lambda: [(process, "id", "127.0.0.1:1")])
    told = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(leave.subprocess, "run", lambda *_, **__: told)
    began = time.monotonic()
    assert leave.main(["--within", "60"]) == EXIT_OK
    assert time.monotonic() - began < 20
    raylet.wait()
