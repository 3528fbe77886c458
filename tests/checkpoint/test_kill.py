"""A process that dies at any moment leaves an intact checkpoint, which is never older than the one before."""

import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parallel.shard import Shard
from tests.checkpoint.world import checkpointers, save
from tests.ranks import CONTEXT
from train.checkpoint.commit import next_attempt
from train.checkpoint.manifest import newest_intact
from train.checkpoint.read_shards import load_shards

SIZE = 20_000


def shards(step: int) -> list[dict[str, Shard]]:
    """Two ranks' halves of a tensor that is `step` everywhere."""
    return [{"w": Shard(torch.full((SIZE,), float(step)), rank * SIZE, (2 * SIZE,))} for rank in range(2)]


def resume(root: Path) -> int:
    """The step of the newest checkpoint, fully verified, its contents checked; 0 if there is none."""
    found = newest_intact(root, full=True)
    assert found.warnings == []
    if found.path is None:
        return 0
    wanted = {"w": Shard(torch.zeros(2 * SIZE), 0, (2 * SIZE,))}
    step = load_shards(found.path, wanted)["step"]
    assert (wanted["w"].local == step).all() and found.path.name == f"step_{step:08d}"
    return step


def train(root: Path, attempt: int) -> None:
    """Save every step until killed."""
    torch.set_num_threads(1)
    step = resume(root)
    world = checkpointers(root, 2, attempt=attempt, keep=2)
    while True:
        step += 1
        assert save(world, step, shards(step))[0].ok


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    rng, reached = random.Random(5), 0
    for _ in range(20):
        process = CONTEXT.Process(target=train, args=(tmp_path, next_attempt(tmp_path)))
        process.start()
        wait_until_it_saves(tmp_path, reached)
        time.sleep(rng.uniform(0, 0.15))
        assert process.exitcode is None, "the writer died by itself"
        process.kill()
        process.join()
        step = resume(tmp_path)
        assert step >= reached
        reached = step
    checkpointers(tmp_path, 2, attempt=next_attempt(tmp_path))
    assert list(tmp_path.glob(".step*")) == [] and len(list(tmp_path.glob("step_*"))) <= 3
    assert reached >= 20


def wait_until_it_saves(root: Path, reached: int) -> None:
    deadline = time.monotonic() + 30
    while not any(int(folder.name[5:]) > reached for folder in root.glob("step_*")):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def replace_and_prune(root: Path, deadly: int) -> None:
    """Write step 2 again and step 3, as attempt 1 that keeps one; die with code 9 at file operation `deadly`."""
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(root) in str(arguments[0]):
            count += 1
            if count == deadly:
                os._exit(9)

    sys.addaudithook(hook)
    world = checkpointers(root, 2, attempt=1, keep=1)
    assert save(world, 2, shards(2))[0].ok
    assert save(world, 3, shards(3))[0].ok


def exit_code(function: Callable, *args) -> int:
    """Of a forked process that calls the function: 0, or 1 if it raised."""
    child = os.fork()
    if child == 0:
        try:
            function(*args)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_death_at_each_file_operation(tmp_path):
    """Including between the two renames that replace a step, and in the middle of the pruning."""
    torch.set_num_threads(1)
    start = tmp_path / "start"
    world = checkpointers(start, 2)
    save(world, 1, shards(1))
    save(world, 2, shards(2))
    reached, code = [], 9
    while code == 9:
        root = shutil.copytree(start, tmp_path / f"death_{len(reached)}")
        code = exit_code(replace_and_prune, root, len(reached) + 1)
        checkpointers(root, 2, attempt=2)
        assert list(root.glob(".step*")) == []
        reached.append(resume(root))
    assert code == 0 and len(reached) > 40
    assert set(reached) == {2, 3} and reached[-1] == 3
