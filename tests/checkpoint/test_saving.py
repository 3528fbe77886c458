"""Saving beside the training: snapshots, failures that cost one checkpoint, fencing, pruning."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cluster.driver.checkpoints import claim_attempt
from cluster.run_files import index_name
from conf.errors import UserError
from conf.files import exclusive
from conf.thresholds import THRESHOLDS
from parallel.exchange import RankNotes
from parallel.shard import Shard, whole
from tests import disks
from tests.checkpoint.world import blank, checkpointers, same_bits, save
from train.checkpoint import commit
from train.checkpoint.checkpointer import Checkpointer, SaveFailed
from train.checkpoint.commit import AttemptFenced, Committer, Save, next_attempt
from train.checkpoint.manifest import newest_intact, read_manifest, verify
from train.checkpoint.read_shards import load_shards
from train.checkpoint.staging import StagingBuffers

torch.set_num_threads(1)


def state(rank: int, step: int, ranks: int = 2, size: int = 40) -> dict[str, Shard]:
    """A rank's part of one tensor that is `step` everywhere."""
    return {"w": Shard(torch.full((size,), float(step)), rank * size, (ranks * size,))}


def states(step: int, ranks: int = 2) -> list[dict[str, Shard]]:
    return [state(rank, step, ranks) for rank in range(ranks)]


def steps(root: Path) -> list[int]:
    return sorted(int(folder.name[5:]) for folder in root.glob("step_*"))


def leftovers(root: Path) -> list[str]:
    return [path.name for path in root.glob(".step*")]


def hold_writes(monkeypatch) -> threading.Event:
    """Make every write wait for the returned event, whose `entered` counts them."""
    gate, real = threading.Event(), StagingBuffers.write
    gate.entered = threading.Semaphore(0)

    def write(stage, folder, rank):
        gate.entered.release()
        assert gate.wait(60)
        return real(stage, folder, rank)

    monkeypatch.setattr(StagingBuffers, "write", write)
    return gate


def test_a_save_is_a_snapshot(tmp_path, monkeypatch):
    gate = hold_writes(monkeypatch)
    (checkpointer,) = checkpointers(tmp_path, 1)
    live, meta = {"w": whole(torch.arange(9.0)), "b": whole(torch.ones(3).bfloat16())}, {"samples": [1]}
    before = {name: Shard(shard.local.clone(), 0, shard.shape) for name, shard in live.items()}
    stall = checkpointer.save(1, live, meta)
    for shard in live.values():
        shard.local.zero_()
    meta["samples"].append(2)
    assert checkpointer.poll() == [] and stall < 5
    gate.set()
    (result,) = checkpointer.finish()
    wanted = blank(live)
    assert load_shards(result.path, wanted)["samples"] == [1] and same_bits(wanted, before)


def test_the_next_save_waits_for_the_one_before(tmp_path, monkeypatch):
    gate = hold_writes(monkeypatch)
    (checkpointer,) = checkpointers(tmp_path, 1)
    assert checkpointer.save(1, state(0, 1, 1), {}) < 5
    threading.Timer(0.3, gate.set).start()
    assert checkpointer.save(2, state(0, 2, 1), {}) > 0.2
    assert [(result.step, result.ok) for result in checkpointer.finish()] == [(1, True), (2, True)]


def test_a_save_that_is_stuck_is_given_up_and_never_committed(tmp_path, monkeypatch):
    gate = hold_writes(monkeypatch)
    (checkpointer,) = checkpointers(tmp_path, 1, timeout=0.05)
    checkpointer.save(1, state(0, 1, 1), {})
    stuck = checkpointer._flight.thread
    assert gate.entered.acquire(timeout=20)
    checkpointer.save(2, state(0, 2, 1), {})
    assert gate.entered.acquire(timeout=20)
    (given_up,) = checkpointer.poll()
    assert (given_up.step, given_up.ok, given_up.ranks) == (1, False, (0,)) and "rank 0 writes for" in given_up.warning
    with pytest.raises(SaveFailed, match=r"not written within .* by rank 0"):
        checkpointer.finish(required=True)
    gate.set()
    stuck.join(20)
    checkpointer.timeout = 20.0
    checkpointer.save(3, state(0, 3, 1), {})
    assert all(result.ok for result in checkpointer.finish(required=True)) and steps(tmp_path) == [2, 3]


def stick(monkeypatch, rank: int, step: int) -> threading.Event:
    """One write of this rank, that of this step, does not end before the returned event."""
    gate, real = threading.Event(), StagingBuffers.write

    def write(stage, folder, writer):
        if writer == rank and f"step_{step:08d}" in folder.name:
            assert gate.wait(60)
        return real(stage, folder, writer)

    monkeypatch.setattr(StagingBuffers, "write", write)
    return gate


def test_a_rank_that_is_stuck_costs_one_checkpoint_and_is_named(tmp_path, monkeypatch):
    """The next one has what the ranks gave it, though the write that is stuck ends in the middle of it."""
    gate = stick(monkeypatch, rank=1, step=1)
    world = checkpointers(tmp_path, 2, timeout=1.0)
    for checkpointer, shards in zip(world, states(1), strict=True):
        checkpointer.save(1, shards, {})
    stuck = world[1]._flight.thread
    assert world[0]._join(30), "rank 0 gives up by itself"
    for step in (2, 3):
        for checkpointer, shards in zip(world, states(step), strict=True):
            checkpointer.committer.timeout = 30.0  # a busy machine has time for what nothing is wrong with
            checkpointer.timeout = 1.0 if step == 2 else 30.0
            checkpointer.save(step, shards, {})
        if step == 2:
            gate.set()
            stuck.join(20)
        for checkpointer in world:
            checkpointer._join(30)
    first, second = (checkpointer.poll() for checkpointer in world)
    assert [(result.step, result.ok) for result in first] == [(1, False), (2, True), (3, True)]
    assert [(result.step, result.ok) for result in second] == [(1, False), (2, True), (3, True)], "told once"
    assert first[0].ranks == second[0].ranks == (1,) and "no files from ranks 1 within" in first[0].warning
    assert steps(tmp_path) == [2, 3] and leftovers(tmp_path) == []
    wanted = blank(state(1, 2))
    load_shards(tmp_path / "step_00000002", wanted)
    assert same_bits(wanted, state(1, 2))


def test_while_two_saves_are_stuck_the_next_ones_are_skipped(tmp_path, monkeypatch):
    gate = hold_writes(monkeypatch)
    monkeypatch.setattr("train.checkpoint.checkpointer.LEAST_GRACE", 0.05)
    (checkpointer,) = checkpointers(tmp_path, 1, timeout=0.05)
    for step in (1, 2):
        checkpointer.save(step, state(0, step, 1), {})
        assert gate.entered.acquire(timeout=20)
    checkpointer.save(3, state(0, 3, 1), {})
    with pytest.raises(SaveFailed, match="step 3 skipped: rank 0 is still writing those of steps 1 and 2") as raised:
        checkpointer.finish(required=True)
    assert raised.value.ranks == (0,) and "free space" not in str(raised.value)
    gate.set()


@pytest.mark.parametrize("how", [{"asynchronous": False}, {"staging": 1}], ids=["synchronous", "in pieces"])
def test_saves_without_a_whole_snapshot_are_done_when_save_returns(tmp_path, monkeypatch, how):
    """What is copied piece by piece must not be trained on meanwhile."""
    monkeypatch.setattr(THRESHOLDS, "staging_bytes", 100)
    (checkpointer,) = checkpointers(tmp_path, 1, **how)
    checkpointer.save(4, state(0, 4, 1), {})
    assert steps(tmp_path) == [4] and checkpointer.poll()[0].ok


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    with disks.small_disk(tmp_path / "disk", "3m") as disk:
        yield disk


def test_a_full_disk_costs_one_checkpoint(small_disk):
    """1 MB of state: the first save fits, the second finds 0.7 MB, the third has room again."""
    world = checkpointers(small_disk, 2)
    shards = [{"w": Shard(torch.randn(131072), rank * 131072, (262144,))} for rank in range(2)]
    assert save(world, 1, shards)[0].ok
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1_400_000))
    failed = save(world, 2, shards)
    assert not failed[0].ok and "checkpoint of step 2 not written" in failed[0].warning
    assert any("No space left" in result.warning for result in failed if not result.ok)
    assert steps(small_disk) == [1] and leftovers(small_disk) == []
    ballast.unlink()
    assert save(world, 3, shards)[0].ok
    assert steps(small_disk) == [1, 3] and verify(small_disk / "step_00000003", full=True) == []


def break_writes(monkeypatch, checkpointer: Checkpointer, times: int) -> None:
    """The next `times` writes of this rank find the disk full."""
    failures, real = iter(range(times)), StagingBuffers.write

    def write(stage, folder, rank):
        if rank == checkpointer.rank and next(failures, None) is not None:
            (folder / "half").write_text("")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(stage, folder, rank)

    monkeypatch.setattr(StagingBuffers, "write", write)


def test_a_passing_failure_is_retried(tmp_path, monkeypatch):
    world = checkpointers(tmp_path, 2, retries=2)
    break_writes(monkeypatch, world[1], 2)
    results = save(world, 1, states(1))
    assert all(result.ok for result in results)
    assert results[0].warning is None and "try 2 " in results[1].warning


@pytest.mark.parametrize("broken", [0, 1])
def test_a_lasting_failure_is_named_and_leaves_nothing(tmp_path, monkeypatch, broken):
    world = checkpointers(tmp_path, 2, retries=1)
    break_writes(monkeypatch, world[broken], 2)
    began = time.monotonic()
    results = save(world, 1, states(1))
    assert time.monotonic() - began < 9, "rank 0 must not wait for its timeout"
    assert not results[0].ok and "No space left" in results[0].warning
    assert ("rank_00001" in results[0].warning) == (broken == 1)
    assert steps(tmp_path) == []
    assert save(world, 2, states(2))[0].ok
    assert steps(tmp_path) == [2] and leftovers(tmp_path) == []


def test_a_rank_whose_disk_takes_no_word_either_says_so_in_the_store_where_the_ranks_met(tmp_path, monkeypatch):
    notes = RankNotes(dist.HashStore())
    world = checkpointers(tmp_path, 2, retries=1, timeout=60.0, notes=notes)
    break_writes(monkeypatch, world[1], 2)
    refused = OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(commit, "atomic_write_text", lambda *_, **__: (_ for _ in ()).throw(refused))
    began = time.monotonic()
    results = save(world, 1, states(1))
    assert time.monotonic() - began < 30 and not results[0].ok and results[0].ranks == (1,)
    assert "rank_00001: " in results[0].warning and "No space left" in results[0].warning
    monkeypatch.undo()
    assert save(world, 2, states(2))[0].ok and steps(tmp_path) == [2], "the note is of that save alone"


def test_a_rank_that_is_gone_is_named(tmp_path):
    world = checkpointers(tmp_path, 3, timeout=2.0)  # in which a busy machine writes all the same
    world[2].save(5, state(2, 5, 3), {})
    world[2].finish()  # written, however long it took
    world[0].save(5, state(0, 5, 3), {})
    with pytest.raises(SaveFailed, match="no files from ranks 1 within"):
        world[0].finish(required=True)
    assert steps(tmp_path) == []
    world[1].save(5, state(1, 5, 3), {})  # too late: it writes in vain, and the next save clears it
    world[1].finish()
    assert save(world, 6, states(6, 3))[0].ok
    assert steps(tmp_path) == [6] and leftovers(tmp_path) == []


def test_an_old_attempt_cannot_write_any_more(tmp_path):
    old = checkpointers(tmp_path, 2, attempt=0, keep=1)
    assert save(old, 10, states(10))[0].ok
    assert next_attempt(tmp_path) == 1
    new = checkpointers(tmp_path, 2, attempt=1, keep=1)
    assert save(new, 8, states(8))[0].ok
    assert steps(tmp_path) == [8], "a later attempt's checkpoint is newer, whatever its step"
    results = save(old, 12, states(12))
    assert all(result.fenced and not result.ok for result in results)
    assert "attempt 1 of this run has started" in results[0].warning
    assert steps(tmp_path) == [8] and leftovers(tmp_path) == []
    with pytest.raises(AttemptFenced):
        Checkpointer(tmp_path, rank=1, world_size=2, attempt=0)


def test_a_copy_without_the_hidden_fence_goes_on_after_its_checkpoints(tmp_path):
    """`cp run/*` and most uploads leave hidden files out."""
    for step in (4, 6, 8):
        save(checkpointers(tmp_path, 1, attempt=5), step, states(step, 1))
    (tmp_path / ".fence").unlink()
    attempt = next_attempt(tmp_path)
    assert attempt == 6
    assert save(checkpointers(tmp_path, 1, attempt=attempt, keep=2), 10, states(10, 1))[0].ok
    assert steps(tmp_path) == [8, 10] and newest_intact(tmp_path).path == tmp_path / "step_00000010"


def test_an_attempt_overtaken_before_its_commit_renames_nothing(tmp_path):
    """Its votes are all in; the new attempt starts between them and the rename."""
    old = Committer(tmp_path, 0, 1, timeout=5)
    old.raise_fence()
    save_ = Save(3, 0)
    folder = old.begin(save_, 0)
    old.vote(save_, 0, {})
    old.await_votes(save_)
    new = Committer(tmp_path, 1, 1, timeout=5)
    new.raise_fence()
    with pytest.raises(AttemptFenced):
        old.commit(save_, {})
    with pytest.raises(AttemptFenced):
        old.prune(1, 0, None)
    assert steps(tmp_path) == [] and folder.exists()
    new.sweep()
    assert leftovers(tmp_path) == []


def test_a_rank_that_saves_before_rank_0_has_entered_keeps_its_files(tmp_path):
    fast = Committer(tmp_path, 1, 2, timeout=5)
    fast.enter(1)
    save_ = Save(3, 0)
    folder = fast.begin(save_, 1)
    fast.vote(save_, 1, {})
    Committer(tmp_path, 1, 2, timeout=5).enter(0)
    assert [path.name for path in folder.iterdir()] == [index_name(1)]


def test_commit_and_fence_exclude_each_other(tmp_path):
    """While the lock is held for a commit, the fence cannot rise; afterwards it does."""
    committer = Committer(tmp_path, 0, 1, timeout=0.1)
    committer.raise_fence()
    newer = Committer(tmp_path, 1, 1, timeout=0.1)
    with committer._lock(), pytest.raises(UserError, match="stayed locked"):
        newer.raise_fence()
    newer.raise_fence()
    assert next_attempt(tmp_path) == 2


def test_a_commit_cut_between_its_renames_is_healed(tmp_path):
    """Replacing step 5, the writer died after the old folder was put aside."""
    save(checkpointers(tmp_path, 2), 5, states(5))
    (tmp_path / "step_00000005").rename(tmp_path / ".step_00000005.attempt_0.replaced")
    checkpointers(tmp_path, 2, attempt=1)
    assert newest_intact(tmp_path).path == tmp_path / "step_00000005" and leftovers(tmp_path) == []


def test_a_step_is_replaced_by_a_later_attempt(tmp_path):
    save(checkpointers(tmp_path, 2), 5, states(5))
    (tmp_path / "step_00000005" / "rank_00000.json").unlink()
    assert save(checkpointers(tmp_path, 2, attempt=1), 5, states(5))[0].ok
    assert read_manifest(tmp_path / "step_00000005").attempt == 1 and leftovers(tmp_path) == []
    assert verify(tmp_path / "step_00000005", full=True) == []


def test_pruning(tmp_path):
    world = checkpointers(tmp_path, 2, keep=2, keep_every=40)
    for step in (10, 20, 30, 40, 50, 60, 70):
        save(world, step, states(step))
    assert steps(tmp_path) == [40, 60, 70]
    later = checkpointers(tmp_path, 2, attempt=1, keep=1)
    later[0].load(tmp_path / "step_00000060", blank(state(0, 60)))
    save(later, 80, states(80))
    assert steps(tmp_path) == [60, 80], "the one that the run resumed from stays"


def test_pruning_counts_intact_ones_only(tmp_path):
    save(checkpointers(tmp_path, 2, keep=0), 10, states(10))
    save(checkpointers(tmp_path, 2, keep=0, attempt=1), 20, states(20))
    (tmp_path / "step_00000020" / "rank_00001.safetensors").unlink()
    committer = Committer(tmp_path, 1, 2, timeout=5)
    committer.prune(1, 0, None)
    assert steps(tmp_path) == [10, 20] and newest_intact(tmp_path).path == tmp_path / "step_00000010"


def test_keep_0_keeps_all(tmp_path):
    world = checkpointers(tmp_path, 1, keep=0)
    for step in range(5):
        save(world, step, [state(0, step, 1)])
    assert steps(tmp_path) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("text", ["", "-5", "1e9", "9" * 5000, "\x1b[2J1", "folder"])
def test_a_damaged_fence_is_named(tmp_path, text):
    if text == "folder":
        (tmp_path / ".fence").mkdir()
    else:
        (tmp_path / ".fence").write_text(text)
    with pytest.raises(UserError, match=r"(?s)\.fence.*is damaged.*remove it") as caught:
        next_attempt(tmp_path)
    assert len(str(caught.value)) < 500 and "\x1b" not in str(caught.value)


def test_a_lock_that_another_process_keeps_is_an_error_with_the_cure(tmp_path):
    (root := tmp_path / "checkpoints").mkdir()
    committer = Committer(root, 1, 1, 0.05)
    with exclusive(root / ".lock", 1.0):
        for start in (lambda: committer.enter(0), committer.sweep, lambda: claim_attempt(tmp_path, 0.05)):
            with pytest.raises(UserError, match=r"(?s)\.lock.*stayed locked for 0 s.*end the process that holds it"):
                start()
