"""Disks that are full, read-only or broken: at the start, in the middle of a run, at its last save."""

import errno
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.cause import read_report
from conf.disk import DISK_FAILED, FULL, HANDLES, REFUSED, RIGHTS, disk_errors, naming, reading
from conf.errors import EXIT_CRASH, EXIT_OK, EXIT_USER, UserError
from conf.files import atomic_write_text, open_lock, read_json
from conf.load import compose
from conf.schema import ROOT
from conf.yaml_file import read_yaml
from parallel.shard import whole
from tests.checkpoint.world import checkpointers, save
from tests.disks import fill, read_only, small_disk
from tests.hold import HOLD, hold_at
from tests.ranks import start_module
from tests.small import arguments, environment, metrics, train
from train.checkpoint.manifest import check_data, newest_intact, read_index, read_manifest
from train.data.corpus import build_corpus
from train.data.token_store import space_errors
from train.hf.folder import open_folder


@pytest.fixture
def disk(tmp_path):
    """The disk that holds the runs; data and cache are elsewhere."""
    with small_disk(tmp_path / "runs", "6m") as folder:
        yield folder


class Training:
    """A run in its own process, whose disk changes while it trains."""

    def __init__(self, tmp_path: Path, *overrides: str):
        """A run of one rank waits at a step that `hold_at` names."""
        self.folder = tmp_path / "runs" / "tiny"
        self.outputs = [tmp_path / "stdout", tmp_path / "stderr"]
        self.hold = tmp_path / HOLD
        command = "train", arguments(tmp_path, *overrides), ROOT, environment() | {"HOLD": str(self.hold)}
        self.process = start_module(*command, self.outputs, forks=True)

    def wait_for_step(self, step: int, rank: int = 0) -> None:
        """Until a rank is at this step, as its progress tells, which a full disk does not stop."""
        deadline = time.monotonic() + 90
        while read_report(rank, None, self.folder / "logs").step < step:
            assert self.process.is_alive() and time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def end(self) -> int:
        self.process.join(200)  # on a busy machine
        return self.process.exitcode

    def said(self) -> str:
        return "".join(path.read_text() for path in self.outputs)


def is_one_screen(said: str, field: str, *words: str) -> bool:
    assert "Traceback" not in said, said
    return all(word in said for word in (f"{field} = ", "rule: ", "cure: ", *words)) or pytest.fail(said)


def test_a_full_disk_at_the_start_is_one_screen(tmp_path, disk):
    fill(disk)
    done = train(tmp_path)
    assert done.returncode == EXIT_USER
    assert is_one_screen(done.stderr, "runs", f"the disk at {disk} has 0 B of 6.29 MB free", "larger disk")
    fill(disk, left=16384)  # enough for the folder and its lock, not for a checkpoint
    done = train(tmp_path)
    assert done.returncode == EXIT_USER
    assert is_one_screen(done.stderr, "runs", "no disk space", "need", str(disk))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [[], ["parallel.dp=2", "parallel.ep=2"]])
def test_a_run_goes_on_while_its_disk_is_full(tmp_path, disk, layout):
    run = Training(tmp_path, "steps=4000", "checkpoint.every=0", "log.validate_every=0", *layout)
    run.wait_for_step(3)
    ballast = fill(disk)
    run.wait_for_step(60)
    run.wait_for_step(60, rank=len(layout) // 2)
    ballast.unlink()
    run.process.kill()
    run.process.join()
    steps = sorted(metrics(tmp_path, "tiny"))
    assert steps[:3] == [1, 2, 3]
    assert is_full_note(run.said(), "progress could not be written") or is_full_note(run.said(), "metrics.jsonl")


def is_full_note(said: str, what: str) -> bool:
    return what in said and "No space left on device" in said and "continues" in said


@pytest.mark.slow
def test_saves_that_a_full_disk_refuses_are_named_and_the_last_one_ends_the_run(tmp_path, disk):
    hold_at(tmp_path / HOLD, 6)
    run = Training(tmp_path, "steps=40", "checkpoint.every=4", "checkpoint.keep=1")
    run.wait_for_step(6)
    fill(disk)
    run.hold.unlink()
    assert run.end() == EXIT_CRASH
    said = run.said()
    assert "checkpoint of step 8 not written" in said.replace("\n", " ") or "checkpoint of step 12 not written" in said
    words = ("No space left on device", f"the disk at {disk} has", "are needed", "start the same command again")
    assert is_one_screen(said, "checkpoint", *words)


@pytest.mark.slow
def test_ranks_say_why_they_failed_where_their_disk_is_too_full_for_the_words(tmp_path, disk):
    run = Training(tmp_path, "steps=40", "checkpoint.every=0", "log.validate_every=0", "parallel.dp=2", "parallel.ep=2")
    run.wait_for_step(3)
    fill(disk)
    assert run.end() == EXIT_CRASH
    assert is_one_screen(run.said(), "checkpoint", "No space left on device", f"the disk at {disk} has")
    assert "without an error message" not in run.said() and "its output is above" not in run.said()
    assert json.loads((run.folder / "logs" / "rank_0.error.json").read_text())["rank"] == 0


@pytest.mark.slow
def test_a_run_whose_folder_became_read_only_goes_on_to_its_last_save(tmp_path):
    hold_at(tmp_path / HOLD, 12)
    run = Training(tmp_path, "steps=60", "checkpoint.every=10", "log.validate_every=0")
    run.wait_for_step(12)
    deadline = time.monotonic() + 90
    while not (run.folder / "checkpoints" / "step_00000010").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    with read_only(run.folder):
        run.hold.unlink()
        assert run.end() == EXIT_CRASH
        assert "Read-only file system" in run.said() and "not written" in run.said()
        assert is_one_screen(run.said(), "checkpoint", str(run.folder), "make it writable")
        for overrides in ([], ["mode=report"], ["mode=evaluate"]):
            done = train(tmp_path, "steps=80", *overrides)
            assert done.returncode == EXIT_USER, done.stdout + done.stderr
            assert is_one_screen(done.stderr, "runs", "Read-only file system", "another folder")
    assert newest_intact(run.folder / "checkpoints", full=True).path is not None
    assert train(tmp_path, "steps=60", "checkpoint.every=0", "log.validate_every=0").returncode == EXIT_OK


@pytest.mark.slow
def test_a_full_cache_of_tokens_names_the_disk_and_what_is_needed(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    text = " ".join(str(number * 7919 % 100_003) for number in range(200_000))
    (corpus / "big.txt").write_text(text)
    with small_disk(tmp_path / "cache", "500k") as cache:
        done = train(tmp_path)
        assert done.returncode == EXIT_USER
        words = ("no space left", f"the disk at {cache} has", "are needed", "SLUICE_CACHE")
        assert is_one_screen(done.stderr, "data.cache", *words)
    assert not list(cache.iterdir())


@pytest.mark.slow
def test_output_to_a_full_disk_is_dropped(tmp_path):
    with small_disk(tmp_path / "logs", "100k") as logs:
        fill(logs)
        command = "train", arguments(tmp_path), ROOT, environment()
        process = start_module(*command, [logs / "stdout", logs / "stderr"])
        process.join(90)
        assert process.exitcode == EXIT_OK
        assert os.stat(logs / "stdout").st_size == 0
    assert len(metrics(tmp_path, "tiny")) == 6


BROKEN = Path("/proc/self/mem")
"""A plain file whose first byte is an input/output error."""


def break_file(path: Path) -> None:
    path.unlink()
    path.symlink_to(BROKEN)


def is_of_a_broken_disk(error: UserError, *words: str) -> None:
    """The error says what was read, and sends nobody to change rights or to download anything."""
    said = str(error)
    assert all(word in said for word in ("cannot be read", "dmesg", *words)), said
    assert not any(word in said for word in ("writable", "rights", "download", "is damaged", "correct it")), said


def test_a_file_that_a_broken_disk_does_not_give_is_named(tmp_path):
    for name, read in {
        "a.json": lambda path: read_json(path, "init_from", "download it again"),
        "a.yaml": read_yaml,
        "model.safetensors": lambda path: open_folder(path.parent),
    }.items():
        (tmp_path / name).symlink_to(BROKEN)
        with pytest.raises(UserError) as caught:
            read(tmp_path / name)
        is_of_a_broken_disk(caught.value, name if name != "a.json" else str(tmp_path))


@pytest.mark.slow
def test_data_that_a_broken_disk_does_not_give_are_named(tmp_path):
    words = arguments(tmp_path)
    corpus = next((tmp_path / "corpus").iterdir())
    build_corpus(compose(*words))
    tokens = next(place for place in (tmp_path / "cache" / "tokens").iterdir() if place.is_dir())
    copy = shutil.copytree(tokens, tmp_path / "copy")
    tokenizer = f"data.tokenizer={shutil.copy(tokens / 'tokenizer.json', tmp_path)}"
    break_file(copy / "hashes.npy")
    with pytest.raises(UserError) as caught:
        build_corpus(compose(*words, "data.format=memmap", f"data.path={copy}", tokenizer))
    is_of_a_broken_disk(caught.value, f"data.path = {copy}")
    break_file(tokens / "hashes.npy")
    config = compose(*words)
    with pytest.raises(UserError) as caught, disk_errors(config):
        build_corpus(config)
    is_of_a_broken_disk(caught.value, "data.cache", str(tokens))
    assert (tokens / "tokens.bin").exists()  # what may be whole is not made again
    break_file(corpus)
    with pytest.raises(UserError) as caught:
        build_corpus(compose(*words))
    is_of_a_broken_disk(caught.value, f"data.path = {corpus}")


def test_a_checkpoint_that_a_broken_disk_does_not_give_is_named(tmp_path):
    root = tmp_path / "checkpoints"
    assert save(checkpointers(root, 1), 1, [{"master.a": whole(torch.zeros(8))}])[0].ok
    folder = root / "step_00000001"
    manifest = read_manifest(folder)
    (data,) = folder.glob("*.safetensors")
    index = next(path for path in folder.glob("*.json") if path.name != "manifest.json")
    for path, read in (
        (data, lambda: check_data(manifest, 0)),
        (index, lambda: read_index(manifest, 0)),
        (folder / "manifest.json", lambda: read_manifest(folder)),
    ):
        break_file(path)
        with pytest.raises(UserError) as caught:
            read()
        is_of_a_broken_disk(caught.value, str(path))
    assert newest_intact(root).path is None


CASES = [(number, reading) for number in sorted(RIGHTS | DISK_FAILED | HANDLES)]
CASES += [(number, naming) for number in sorted(REFUSED | HANDLES)]


@pytest.fixture(scope="module")
def composed():
    return compose()


@pytest.mark.parametrize(("number", "way"), CASES)
def test_every_number_of_the_system_has_the_cure_of_reading_or_of_writing(tmp_path, composed, number, way):
    config = replace(composed, runs=str(tmp_path))
    with pytest.raises(UserError) as caught, disk_errors(config), way(tmp_path / "a"):
        raise OSError(number, os.strerror(number))
    said, cure = str(caught.value), caught.value.cure
    verb = "read" if way is reading else "written"
    assert caught.value.field == "runs" and f"a cannot be {verb}: {os.strerror(number)}" in said
    assert ("dmesg" in cure) == (number in DISK_FAILED) and ("ulimit -n" in cure) == (number in HANDLES)
    assert ("writable" in cure) == (way is naming and number in {*RIGHTS, errno.EROFS})
    assert ("free space" in cure) == (number in FULL) and ("ulimit -f" in cure) == (number == errno.EFBIG)
    if way is naming and number in REFUSED:
        with pytest.raises(UserError, match="SLUICE_CACHE") as caught, space_errors(tmp_path):
            raise OSError(number, os.strerror(number))
        assert caught.value.cure.startswith(cure.partition(", or set")[0])


def test_rights_that_are_missing_say_which(tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.touch()
    for readable, words in ((True, "written: .* make it writable"), (False, r"read: .* let user \d+ read it")):
        monkeypatch.setattr(os, "access", lambda path, mode, readable=readable: readable)
        with pytest.raises(UserError, match=f"(?s){words}"), disk_errors():
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(file))


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path, composed):
    """A run's own files, whether they are written, read or locked."""
    config, place = replace(composed, runs=str(tmp_path)), tmp_path / "run" / "starts.json"
    place.mkdir(parents=True)
    for way in (lambda: atomic_write_text(place, "[]"), place.read_text, lambda: open_lock(place)):
        with pytest.raises(UserError) as caught, disk_errors(config):
            way()
        assert caught.value.field == "runs" and f"{place} cannot be" in str(caught.value)
        assert "is needed for a file" in caught.value.cure
    assert [path.name for path in place.parent.iterdir()] == ["starts.json"]
