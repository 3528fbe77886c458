"""A damaged checkpoint is found, named and skipped."""

import json
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conf.errors import UserError
from parallel.shard import whole
from tests.checkpoint.world import blank, checkpointers, same_bits, save
from train.checkpoint import manifest
from train.checkpoint.manifest import CheckpointDamaged, newest_intact, read_manifest, seal, verify
from train.checkpoint.read_shards import load_shards

torch.set_num_threads(1)

NAMES = ["rank_00000.safetensors", "rank_00000.json", "rank_00001.safetensors", "rank_00001.json", "manifest.json"]


def two_checkpoints(root: Path) -> list[dict]:
    """Steps 10 and 20 of two ranks; returns the shards of step 10."""
    world = checkpointers(root, 2)
    states = [[{f"w{rank}": whole(torch.randn(300) + step)} for rank in range(2)] for step in (10, 20)]
    for step, shards in zip((10, 20), states, strict=True):
        assert [result.warning for result in save(world, step, shards)] == [None, None]
    return states[0]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << (at % 8)
    path.write_bytes(data)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", [Path.unlink, cut])
def test_a_missing_or_short_file_costs_one_checkpoint(tmp_path, name, damage):
    two_checkpoints(tmp_path)
    damage(tmp_path / "step_00000020" / name)
    found = newest_intact(tmp_path)
    assert found.path == tmp_path / "step_00000010"
    (warning,) = found.warnings
    assert f"step_00000020/{name}" in warning
    assert any(word in warning for word in ("missing", "bytes, but", "not valid JSON"))
    with pytest.raises(CheckpointDamaged, match=name):
        load_shards(tmp_path / "step_00000020", {f"w{rank}": whole(torch.zeros(300)) for rank in range(2)})


@pytest.mark.parametrize("name", NAMES)
def test_every_flipped_bit_is_found(tmp_path, name):
    shards = two_checkpoints(tmp_path)
    path, rng = tmp_path / "step_00000010", random.Random(name)
    original = (path / name).read_bytes()
    places = {0, 7, 8, len(original) - 1, *(rng.randrange(len(original)) for _ in range(60))}
    for at in places:
        (path / name).write_bytes(original)
        flip(path / name, at)
        (problem,) = verify(path, full=True)
        assert name in problem or (name.endswith("json") and "manifest" in problem)
    (path / name).write_bytes(original)
    assert verify(path, full=True) == []
    wanted = blank(shards[0])
    load_shards(path, wanted)
    assert same_bits(wanted, shards[0])


def test_a_flipped_bit_stops_only_who_reads_it(tmp_path):
    """The fast verification cannot see it; load does, and the search goes on without that checkpoint."""
    two_checkpoints(tmp_path)
    flip(tmp_path / "step_00000020" / "rank_00001.safetensors", 600)
    found = newest_intact(tmp_path)
    assert found.path == tmp_path / "step_00000020" and found.warnings == []
    load_shards(found.path, {"w0": whole(torch.zeros(300))})
    with pytest.raises(CheckpointDamaged, match=r"(?s)rank_00001\.safetensors.*the checksum of block 0 does not match"):
        load_shards(found.path, {"w1": whole(torch.zeros(300))})
    assert newest_intact(tmp_path, skip={found.path}).path == tmp_path / "step_00000010"
    found = newest_intact(tmp_path, full=True)
    assert found.path == tmp_path / "step_00000010" and "rank_00001.safetensors" in found.warnings[0]


def test_nothing_intact(tmp_path):
    assert newest_intact(tmp_path / "none").path is None
    two_checkpoints(tmp_path)
    for folder in tmp_path.glob("step_*"):
        (folder / "rank_00001.json").unlink()
    found = newest_intact(tmp_path)
    assert found.path is None and len(found.warnings) == 2


@pytest.mark.parametrize("when", ["read_manifest", "_problems"])
def test_what_is_pruned_during_a_search_is_looked_for_again(tmp_path, monkeypatch, when):
    """A run that lives commits a newer checkpoint and prunes those that the search has listed."""
    two_checkpoints(tmp_path)
    newer, real = shutil.copytree(tmp_path / "step_00000020", tmp_path / "newer"), getattr(manifest, when)

    def late(*arguments):
        if newer.exists():
            for folder in tmp_path.glob("step_*"):
                shutil.rmtree(folder)
            newer.rename(tmp_path / "step_00000030")
        return real(*arguments)

    monkeypatch.setattr(manifest, when, late)
    found = newest_intact(tmp_path)
    assert found.path == tmp_path / "step_00000030" and found.warnings == []


def test_a_newer_format_is_not_passed_over(tmp_path):
    two_checkpoints(tmp_path)
    newer = shutil.copytree(tmp_path / "step_00000020", tmp_path / "step_00000030")
    (newer / "manifest.json").write_text(seal({"format": "sluice checkpoint", "version": 2}))
    with pytest.raises(UserError, match="version 2"):
        newest_intact(tmp_path)


def rewrite(path: Path, change: Callable[[dict], None]) -> None:
    """Change a manifest and seal it again, as an edit by hand or another program would."""
    body = json.loads(path.read_text())
    del body["crc32"]
    change(body)
    path.write_text(seal(body))


FIELDS = ("version", "step", "attempt", "world_size", "meta", "files", "tensors")
CASES = [(name, value) for name in FIELDS for value in (None, "7", -1, [[1]], {"a": {"b": 1}})]


@pytest.mark.parametrize(
    "name, value", [case for case in CASES if case not in (("version", -1), ("meta", CASES[4][1]))]
)
def test_a_sealed_manifest_that_lacks_something_is_damaged(tmp_path, name, value):
    two_checkpoints(tmp_path)
    path = tmp_path / "step_00000020" / "manifest.json"
    rewrite(path, lambda body: body.pop(name) if value is None else body.update({name: value}))
    with pytest.raises(CheckpointDamaged, match=r"(?s)manifest\.json is|manifest\.json\n"):
        read_manifest(path.parent)
    assert newest_intact(tmp_path).path == tmp_path / "step_00000010"


@pytest.mark.parametrize(
    "interval", [[0, 0, 2**62], [0, 0, 301], [0, 2**62, 0], [0, 1, 300], [2, 0, 300], [2**62, 0, 0], [0, 0, 10**30]]
)
def test_a_forged_interval_is_damage(tmp_path, interval):
    two_checkpoints(tmp_path)
    folder = tmp_path / "step_00000020"
    rewrite(folder / "manifest.json", lambda body: body["tensors"]["w0"][2].append(interval))
    with pytest.raises(CheckpointDamaged, match=r"manifest\.json\n.*w0"):
        load_shards(folder, {"w0": whole(torch.zeros(300))})
    assert newest_intact(tmp_path).path == tmp_path / "step_00000010"


@pytest.mark.parametrize("step", [-1, 2**63, 10**400])
def test_a_forged_number_in_the_meta_is_damage(tmp_path, step):
    two_checkpoints(tmp_path)
    path = tmp_path / "step_00000020" / "manifest.json"
    rewrite(path, lambda body: body["meta"].update(step=step))
    with pytest.raises(CheckpointDamaged, match="its meta has step = "):
        _ = read_manifest(path.parent).meta["step"]


def test_a_manifest_names_what_its_meta_lacks(tmp_path):
    two_checkpoints(tmp_path)
    path = tmp_path / "step_00000020" / "manifest.json"
    with pytest.raises(CheckpointDamaged, match="its meta lacks 'tokenizer'"):
        _ = read_manifest(path.parent).meta["tokenizer"]
    rewrite(path, lambda body: body["meta"].update(step="20"))
    with pytest.raises(CheckpointDamaged, match="its meta has step = '20'"):
        _ = read_manifest(path.parent).meta["step"]


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"3", b"null"])
def test_a_manifest_that_is_no_json_object_is_named(tmp_path, text):
    two_checkpoints(tmp_path)
    (tmp_path / "step_00000020" / "manifest.json").write_bytes(text)
    found = newest_intact(tmp_path)
    assert found.path == tmp_path / "step_00000010" and "step_00000020/manifest.json" in found.warnings[0]


def test_a_sealed_index_that_describes_no_data_file_is_damaged(tmp_path):
    two_checkpoints(tmp_path)
    folder = tmp_path / "step_00000020"
    whole_text = (folder / "rank_00000.json").read_text()
    for change in (
        lambda index: index.pop("tensors"),
        lambda index: index.update(blocks_crc32=[]),
        lambda index: index.update(header_bytes="8"),
        lambda index: index["tensors"].clear(),
        lambda index: index["tensors"].update(w0=["F32", [300], 0, 300, 10**9]),
        lambda index: index["tensors"].update(w0=["F99", [300], 0, 300, 0]),
        lambda index: index["tensors"].update(w0=["F32", [300], 100, 200, 0]),
        lambda index: index["tensors"].update(w0=["F32", [300], -100, 400, 400]),
        lambda index: index["tensors"].update(w0=["F32", [300], 0, 200, 0]),
        lambda index: index["tensors"].update(w0=["I32", [300], 0, 300, 0]),
        lambda index: index["tensors"].update(w0=["F32", [30, 10], 0, 300, 0]),
        lambda index: index["tensors"].update(w0=3),
    ):
        index = json.loads(whole_text)
        change(index)
        text = json.dumps(index).encode()
        (folder / "rank_00000.json").write_bytes(text)
        checksum = [len(text), zlib.crc32(text)]
        rewrite(folder / "manifest.json", lambda body, it=checksum: body["files"].update({"rank_00000.json": it}))
        with pytest.raises(CheckpointDamaged, match=r"rank_00000\.json"):
            load_shards(folder, {"w0": whole(torch.zeros(300))})
