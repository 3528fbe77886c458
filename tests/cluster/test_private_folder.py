"""The temporary folders of a run are removed with it, even if the driver is killed."""

import multiprocessing
import os
import signal
import sys
import time

import pytest

from cluster import private_folder
from cluster.local import run_local
from cluster.private_folder import PrivateFolder, remove_dead


def _hold(parent, pipe):
    folder = PrivateFolder("sluice-ray-", parent)
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
    alive = PrivateFolder("sluice-ray-", tmp_path)
    assert killed.exists(), "its process lives"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    monkeypatch.setattr(private_folder, "FRESH", 60.0)
    PrivateFolder("sluice-ray-", tmp_path).remove()
    assert killed.exists(), "it may be about to get its lock"
    monkeypatch.setattr(private_folder, "FRESH", 0.0)
    PrivateFolder("sluice-ray-", tmp_path).remove()
    assert not killed.exists() and alive.path.exists()
    alive.remove()
    assert not list(tmp_path.iterdir())


def test_the_store_of_a_run_that_was_killed_is_removed_by_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spawn = multiprocessing.get_context("spawn")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process = spawn.Process(
        target=run_local, args=([sys.executable, "-c", "import time; time.sleep(60)"], 1, tmp_path / "logs")
    )
    process.start()
    deadline = time.monotonic() + 120
    while not (left := list(tmp_path.glob("sluice-store-*"))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert left[0].exists()
    monkeypatch.setattr(private_folder, "FRESH", 0.0)
    while left[0].exists():  # a rank that had not begun its own program yet holds the lock with its parent for a moment
        assert time.monotonic() < deadline
        assert run_local([sys.executable, "-c", ""], 1, tmp_path / "logs") == 0
    assert not list(tmp_path.glob("sluice-store-*"))


@pytest.mark.parametrize("kind", ["link", "file", "stranger"])
def test_what_is_not_a_folder_of_this_user_is_left_alone(tmp_path, monkeypatch, kind):
    if kind == "stranger" and os.geteuid() != 0:
        pytest.skip("needs root to give a folder away")
    monkeypatch.setattr(private_folder, "FRESH", 0.0)
    (precious := tmp_path / "precious").mkdir()
    (precious / "file").touch()
    found = tmp_path / "sluice-ray-x"
    if kind == "link":
        found.symlink_to(precious)
    elif kind == "file":
        found.touch()
    else:
        found.mkdir()
        os.chown(found, 65534, 65534)
    remove_dead("sluice-ray-", tmp_path)
    assert (precious / "file").exists() and os.path.lexists(found)
