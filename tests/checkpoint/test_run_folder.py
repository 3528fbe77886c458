"""The run folder: one live run at a time, and where it resumes."""

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from conf.errors import UserError
from conf.load import compose, read_config
from conf.run_paths import RunPaths
from parallel.shard import whole
from tests.checkpoint.world import checkpointers, save
from tests.ranks import CONTEXT
from train.checkpoint import run_folder
from train.checkpoint.commit import Committer
from train.checkpoint.run_folder import RunFolder, held_by_rank_0, resume_point
from train.data.token_store import locked

torch.set_num_threads(1)


def config(root: Path, *overrides: str):
    return compose(f"runs={root}", "name=a", *overrides)


def write_steps(root: Path, *steps: int) -> None:
    world = checkpointers(root / "a" / "checkpoints", 1, keep=0)
    for step in steps:
        assert save(world, step, [{"w": whole(torch.ones(3))}])[0].ok


def hold(root: Path, pipe) -> None:
    """Take the run folder and keep it until told, or killed."""
    with RunFolder(config(root)):
        pipe.send("held")
        pipe.recv()


@pytest.mark.slow
def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path):
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=hold, args=(tmp_path, theirs))
    process.start()
    assert ours.poll(30) and ours.recv() == "held"
    with pytest.raises(UserError) as caught:
        RunFolder(config(tmp_path))
    assert caught.value.field == "name"
    assert f"in use by process {process.pid} on host {socket.gethostname()}" in caught.value.rule
    process.kill()
    process.join()
    with RunFolder(config(tmp_path)) as folder:
        assert folder.path == tmp_path / "a"
        with pytest.raises(UserError, match=f"process {os.getpid()} "):
            RunFolder(config(tmp_path))
    RunFolder(config(tmp_path)).close()


def be_rank_0(root: Path, pipe) -> None:
    """Hold the run folder as rank 0 until told, or killed."""
    with held_by_rank_0(RunPaths(config(root))):
        pipe.send("held")
        pipe.recv()


@pytest.mark.slow
def test_a_start_waits_for_a_rank_0_that_outlives_its_driver(tmp_path, monkeypatch, capsys):
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=be_rank_0, args=(tmp_path, theirs))
    process.start()
    assert ours.poll(30) and ours.recv() == "held"
    with held_by_rank_0(RunPaths(config(tmp_path))):
        pass  # ranks 0 of two attempts do not exclude each other
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "longest_afterlife", lambda _: 0.1)
        with pytest.raises(UserError, match="rank 0 of an earlier start still writes"):
            RunFolder(config(tmp_path))
    assert "waiting for its end" in capsys.readouterr().err
    killing = threading.Timer(0.3, process.kill)
    killing.start()
    with RunFolder(config(tmp_path)):
        assert not process.is_alive()
    killing.join()


LOCKS = {
    "of the run": lambda root: RunFolder(config(root)).close() or root / "a" / ".lock",
    "of rank 0": lambda root: RunFolder(config(root)).close() or root / "a" / ".rank_0.lock",
    "of checkpoints": lambda root: (
        Committer(root / "a" / "checkpoints", 1, 1, 1.0).enter(0) or root / "a" / "checkpoints" / ".lock"
    ),
    "of prepared data": lambda root: locked(root / "a", print).__enter__() or root / ".a.lock",
}


@pytest.mark.slow
@pytest.mark.parametrize("make", LOCKS.values(), ids=LOCKS)
def test_no_other_user_can_open_a_lock_file(tmp_path, make):
    """Who can open one for reading can lock it, and keep every start out."""
    lock = make(tmp_path)
    lock.parent.chmod(0o755)
    lock.chmod(0o644)  # as earlier versions made it
    assert make(tmp_path) == lock and lock.stat().st_mode & 0o777 == 0o600
    lock.unlink()
    assert make(tmp_path) == lock and lock.stat().st_mode & 0o777 == 0o600
    lock.parent.chmod(0o2770)  # a folder that its group shares, such as data.cache
    assert make(tmp_path) == lock and lock.stat().st_mode & 0o777 == 0o660


def test_a_lock_is_not_said_to_be_held_by_a_process_that_has_ended(tmp_path):
    RunFolder(config(tmp_path)).close()
    lock = tmp_path / "a" / ".lock"
    ended = subprocess.Popen(["true"])
    ended.wait()
    with lock.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        lock.write_text(f"process {ended.pid} on host {socket.gethostname()}\n")
        with pytest.raises(UserError, match=f"in use by another process .`fuser {lock}.*{ended.pid}.* has ended"):
            RunFolder(config(tmp_path))


def test_child_processes_do_not_inherit_the_lock(tmp_path):
    folder = RunFolder(config(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    folder.close()
    RunFolder(config(tmp_path)).close()
    child.communicate(b"\n")


def test_the_folder_holds_the_configuration(tmp_path):
    written = config(tmp_path, "seed=5", "conf=deepseek_v3_16b", "data=stdlib")
    with RunFolder(written) as folder:
        assert read_config(str(folder.config_path)) == written
        assert folder.checkpoints.is_dir() and folder.logs.is_dir()
        assert [p.name for p in folder.path.iterdir() if p.name.endswith(".tmp")] == []


def test_it_needs_no_torch():
    code = "import sys, train.checkpoint.run_folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    os.chown(tmp_path / "a", 12345, -1)
    with pytest.raises(UserError, match="belongs to user 12345"):
        RunFolder(config(tmp_path))
    assert list((tmp_path / "a").iterdir()) == []


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match="cannot be created"):
        RunFolder(config(tmp_path))


def test_disk_space_is_checked_for_all_that_will_be_kept(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10 * 10**9))
    RunFolder(config(tmp_path, "checkpoint.keep=3"), checkpoint_bytes=2 * 10**9).close()
    with pytest.raises(UserError, match=r"4 checkpoints of about 3\.0 GB need 12\.0 GB, and 10\.0 GB are free"):
        RunFolder(config(tmp_path, "checkpoint.keep=3"), checkpoint_bytes=3 * 10**9)
    write_steps(tmp_path, 1, 2)  # two are there, of the four and that which the run resumes from
    RunFolder(config(tmp_path, "checkpoint.keep=3"), checkpoint_bytes=3 * 10**9).close()


def test_never_refuses_a_run_with_checkpoints(tmp_path):
    never = config(tmp_path, "resume=never")
    with RunFolder(never):
        assert resume_point(never).path is None
    write_steps(tmp_path, 4)
    with pytest.raises(UserError, match=r"already has checkpoints, the last one .*step_00000004"):
        RunFolder(never)
    RunFolder(config(tmp_path)).close()


def test_auto_takes_the_newest_intact_and_names_the_damaged(tmp_path):
    auto = config(tmp_path)
    assert resume_point(auto).path is None
    write_steps(tmp_path, 4, 8)
    checkpoints = RunPaths(auto).checkpoints
    assert resume_point(auto).path == checkpoints / "step_00000008"
    (checkpoints / "step_00000008" / "rank_00000.json").unlink()
    found = resume_point(auto)
    assert found.path == checkpoints / "step_00000004" and "step_00000008/rank_00000.json" in found.warnings[0]
    with pytest.raises(UserError, match="no checkpoint of this run is intact"):
        resume_point(auto, skip={found.path})


def test_a_path_names_a_checkpoint_or_a_run(tmp_path):
    write_steps(tmp_path, 4, 8)
    run = tmp_path / "a"
    for path in (run, run / "checkpoints", run / "checkpoints" / "step_00000008"):
        other = compose(f"runs={tmp_path}", "name=b", f"resume={path}")
        assert resume_point(other).path == run / "checkpoints" / "step_00000008"
    (run / "checkpoints" / "step_00000004" / "rank_00000.json").unlink()
    for path, rule in (
        (run / "checkpoints" / "step_00000004", "is missing"),
        (tmp_path, "has no manifest"),
        ("/nowhere", "does not exist"),
    ):
        with pytest.raises(UserError, match=rule):
            resume_point(compose(f"runs={tmp_path}", "name=b", f"resume={path}"))


@pytest.mark.parametrize("content", [b"\xff\xfe\0", b""])
def test_a_damaged_config_of_an_earlier_start_is_replaced(tmp_path, content):
    words = "conf=tiny", f"runs={tmp_path}", "name=a"
    new, path = compose(*words), tmp_path / "a" / "config.yaml"
    path.parent.mkdir()
    path.write_bytes(content)
    with RunFolder(compose(*words)):
        assert read_config(str(path)) == new, "also the way to hold out documents"


def test_a_refused_start_leaves_the_settings_of_the_run(tmp_path):
    """Other modes read the model of the checkpoints from config.yaml."""
    settings = tmp_path / "a" / "config.yaml"
    with RunFolder(config(tmp_path, "model.layers=3")):
        pass
    with pytest.raises(UserError), RunFolder(config(tmp_path, "model.layers=6")):
        assert read_config(str(settings)).model.layers == 6  # what the ranks read
        raise UserError("model.layers", 6, "does not fit the checkpoint", "take 3")
    assert read_config(str(settings)).model.layers == 3
    with pytest.raises(UserError), RunFolder(compose(f"runs={tmp_path}", "name=new")):
        raise UserError("model.layers", 6, "does not fit", "take 3")
    assert not (tmp_path / "new" / "config.yaml").exists()


@pytest.mark.parametrize(("there", "needed"), [(0, 4), (1, 4), (3, 2), (4, 1), (9, 1)])
def test_room_for_checkpoints_counts_the_one_that_the_run_resumes_from(tmp_path, monkeypatch, there, needed):
    """Three that are kept, one in the making, and one that stays as long as the run that came from it goes on."""
    composed = config(tmp_path, "checkpoint.keep=3")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(run_folder, "checkpoints", lambda _: [None] * there)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed * 10**9))
    run_folder.check_space(composed, 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed * 10**9 - 1))
    with pytest.raises(UserError, match=f"{needed} checkpoints of about 1.0 GB"):
        run_folder.check_space(composed, 10**9)
