"""The folder of a Ray that a run starts goes with the run, also where the driver is killed."""

import multiprocessing
import os
import signal
import time

from cluster.driver import private_folder
from cluster.driver.private_folder import PrivateFolder


def _hold(parent, pipe):
    folder = PrivateFolder(parent)
    (folder.path / "ray").mkdir()
    pipe.send(folder.path)
    time.sleep(60)


def test_a_killed_process_leaves_no_folder_once_the_next_one_makes_its_own(tmp_path, monkeypatch):
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_hold, args=(tmp_path, there))
    process.start()
    killed = here.recv()
    assert killed.stat().st_mode & 0o777 == 0o700

    monkeypatch.setattr(private_folder, "FRESH", 0.0)
    alive = PrivateFolder(tmp_path)
    assert killed.exists(), "its process lives"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    monkeypatch.setattr(private_folder, "FRESH", 60.0)
    PrivateFolder(tmp_path).remove()
    assert killed.exists(), "it may be about to get its lock"
    monkeypatch.setattr(private_folder, "FRESH", 0.0)
    PrivateFolder(tmp_path).remove()
    assert not killed.exists() and alive.path.exists()
    alive.remove()
    assert not list(tmp_path.iterdir())
