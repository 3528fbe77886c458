"""From a folder of files to batches: caching, damage, concurrency, the split, and exact bytes."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from conf.errors import UserError
from conf.load import compose
from conf.schema import Config
from train.data import corpus, tokenise
from train.data.corpus import build_corpus
from train.data.prefetch import Prefetch
from train.data.prepare import PreparedData, prepare
from train.data.sources import place_of
from train.data.tokenizer import Tokenizer, in_parts, train_bpe

DOCUMENTS = {
    f"{number:02}.txt": f"document {number}: " + f"w{number * 37 % 101} \u00fc\n" * (number + 1) for number in range(40)
}


@pytest.fixture
def folder(tmp_path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    for name, text in DOCUMENTS.items():
        (data / name).write_text(text, encoding="utf-8")
        os.utime(data / name, (1e9, 1e9))  # long enough ago for the manifest to trust it
    return data


@lru_cache
def composed(*overrides: str) -> Config:
    return compose("seq_len=32", "model.vocab_size=400", "data.validation_fraction=0.2", "data.workers=1", *overrides)


def config_of(path: Path | None, cache: Path, *overrides: str) -> Config:
    config = composed(*overrides)
    path = None if path is None else str(path)
    return replace(config, data=replace(config.data, path=path, cache=str(cache)))


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def stages_of(config: Config) -> tuple[PreparedData, list[str]]:
    stages: list[str] = []
    return prepare(config, lambda stage, done, total: stages.append(stage)), stages


def texts_of(prepared: PreparedData, documents) -> list[str]:
    spans = zip(documents.starts_D.tolist(), documents.lengths_D.tolist(), strict=True)
    return [prepared.tokenizer.decode(documents.tokens[start : start + length].tolist()) for start, length in spans]


def test_whole_files_are_held_out_and_nothing_is_lost(folder, cache):
    config = config_of(folder, cache)
    prepared, part = prepare(config), build_corpus(config).parts[0]
    train, held_out = texts_of(prepared, part.train), texts_of(prepared, part.validation)
    assert sorted(train + held_out) == sorted(DOCUMENTS.values())
    assert 2 <= len(held_out) <= 16
    moved = folder.parent / "elsewhere"  # the side follows from the content, nothing else
    folder.rename(moved)
    (moved / "99.txt").write_text("another")
    again = build_corpus(config_of(moved, cache)).parts[0]
    assert set(texts_of(prepared, again.validation)) >= set(held_out) or len(again.validation) >= len(held_out)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text"])
def test_a_renamed_file_holds_the_same_documents_out(folder, cache, kind):
    """With hold_out_by=name it holds others out, as runs of earlier versions do."""
    rows = [{"text": text} for text in DOCUMENTS.values()]
    data, renamed = folder.parent / f"a.{kind}", folder.parent / f"b.{kind}"
    if kind == "jsonl":
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data)
    else:
        data = folder
        renamed = shutil.copytree(folder, renamed)
        for file in list(renamed.iterdir()):
            file.rename(file.with_name(f"x{file.name}"))

    def held_out(path: Path, by: str) -> tuple[set[str], str]:
        part = (prepared := build_corpus(config_of(path, cache, f"data.hold_out_by={by}"))).parts[0]
        return set(texts_of(prepared, part.validation)), part.content

    before = held_out(data, "content"), held_out(data, "name")
    if kind != "text":
        data.rename(renamed)
    after = held_out(renamed, "content"), held_out(renamed, "name")
    assert after[0] == before[0] and after[1][0] != before[1][0]


def test_equal_documents_that_follow_one_another_are_several(folder, cache):
    data = folder.parent / "a.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["same words"] * 3 + ["other", "third"] * 4))
    part = build_corpus(config_of(data, cache, "model.vocab_size=300")).parts[0]
    assert len(part.whole) == 11


def test_a_chat_is_held_out_by_what_it_says(tmp_path, cache):
    """Whatever the file, its format and the order of keys; an absent key of Parquet is a null."""
    chats = [
        [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n}"}]
        for n in range(40)
    ]
    chats[3][1]["name"] = "somebody"
    Tokenizer(train_bpe(["question answer 0123456789"], 300)).save(tmp_path)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    turned = [{"id": n, "messages": [dict(reversed(one.items())) for one in chat]} for n, chat in enumerate(chats)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(one) + "\n" for one in turned))
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"messages": chat} for chat in chats]), tmp_path / "c.parquet"
    )
    words = ["data=chat", "data.path=later", "data.template=plain", f"data.tokenizer={tmp_path}"]
    found = []
    for name in ("a.jsonl", "b.jsonl", "c.parquet"):
        prepared = build_corpus(config_of(tmp_path / name, cache, *words))
        found.append(texts_of(prepared, prepared.parts[0].validation))
    assert found[0] == found[1] == found[2] and 2 <= len(found[0]) <= 16


def test_the_second_start_reads_and_makes_nothing(folder, cache, monkeypatch):
    first, stages = stages_of(config_of(folder, cache))
    assert {"reading", "training the tokenizer", "tokenising"} <= set(stages)
    opened = Path.open

    def watched(path: Path, *args: object, **settings: object):
        assert folder not in path.parents, f"{path} was opened"
        return opened(path, *args, **settings)

    monkeypatch.setattr(Path, "open", watched)
    second, stages = stages_of(config_of(folder, cache))
    assert stages == [] and second.fingerprint == first.fingerprint
    assert (second.train.batch(5, 8).tokens_BS == first.train.batch(5, 8).tokens_BS).all()


def test_a_changed_file_is_noticed_also_with_the_same_size_and_a_fresh_time(folder, cache):
    prepared = prepare(config_of(folder, cache))
    for swap in ("X", "Y"):  # the second change may fall into the same tick of the clock
        path = folder / "07.txt"
        path.write_text(path.read_text().replace("w", swap).replace("X", swap))
        changed, stages = stages_of(config_of(folder, cache))
        assert changed.fingerprint != prepared.fingerprint and "tokenising" in stages
        prepared = changed


def test_samples_do_not_depend_on_grouping_and_do_on_the_seed(folder, cache):
    prepared = prepare(config_of(folder, cache, "data.fim_rate=0.3", "data.mask_documents=true"))
    whole = prepared.train.batch(100, 24)
    assert whole.tokens_BS.shape == whole.documents_BS.shape == (24, 33)
    for first in range(100, 124, 3):
        part = prepared.train.batch(first, 3)
        assert (part.tokens_BS == whole.tokens_BS[first - 100 : first - 97]).all()
        assert (part.documents_BS == whole.documents_BS[first - 100 : first - 97]).all()
    other = prepare(config_of(folder, cache, "data.fim_rate=0.3", "seed=2"))
    assert (other.train.batch(100, 24).tokens_BS != whole.tokens_BS).any()
    assert (other.validation.batch(0, 9).tokens_BS == prepared.validation.batch(0, 9).tokens_BS).all()


def test_validation_bytes_are_those_of_the_decoded_targets(folder, cache):
    prepared = prepare(config_of(folder, cache, "log.validation_sequences=6"))
    assert len(prepared.validation) == 6
    total = 0
    for first in range(0, 6, 4):
        batch = prepared.validation.batch(first, 4)
        assert len(batch.tokens_BS) == min(4, 6 - first)
        backend = prepared.tokenizer._backend
        for targets in batch.tokens_BS[:, 1:].tolist():
            words = [backend.id_to_token(token) for token in targets if token != prepared.tokenizer.eos_id]
            total += sum(len(word) for word in words)
        assert prepared.validation.text_bytes(batch) > 0
    assert total == prepared.validation.text_bytes(prepared.validation.batch(0, 6))
    # Over a whole pass every byte of every held-out document is counted once.
    config = config_of(folder, cache, "seq_len=1", "log.validation_sequences=100000", "model.mtp_depth=0")
    every = prepare(config)
    text = texts_of(every, build_corpus(config).parts[0].validation)
    first_token = every.validation.batch(0, 1).tokens_BS[0, 0]
    counted = every.validation.text_bytes(every.validation.batch(0, len(every.validation)))
    assert counted + every.tokenizer.bytes_V[first_token] == sum(len(each.encode()) for each in text)


def test_too_little_held_out_text_is_used_as_it_is(tmp_path, cache):
    (tmp_path / "one.txt").write_text("alpha beta gamma delta " * 20)
    prepared = prepare(config_of(tmp_path / "one.txt", cache, "seq_len=64"))
    assert len(prepared.validation) == 1 and prepared.validation.batch(0, 9).tokens_BS.shape == (1, 65)
    assert any("more than once" in note for note in prepared.notes)
    assert any("stay unused" in note for note in prepared.notes)
    part = build_corpus(config_of(tmp_path / "one.txt", cache)).parts[0]
    train, held_out = texts_of(prepared, part.train)[0], texts_of(prepared, part.validation)[0]
    assert train + held_out == "alpha beta gamma delta " * 20
    assert 0.15 < len(held_out) / len(train + held_out) < 0.25


@pytest.mark.parametrize("name", ["tokens.bin", "documents.npy", "hashes.npy", "meta.json", "tokenizer.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "empty"])
def test_a_damaged_cache_entry_is_named_and_made_again(folder, cache, tmp_path, name, harm):
    first = prepare(config_of(folder, cache))
    expected = first.train.batch(0, 8).tokens_BS  # read now: the file that is mapped will be harmed
    (entry,) = (path for path in (cache / "tokens").iterdir() if path.is_dir())
    path, raw = entry / name, (entry / name).read_bytes()
    if harm == "remove":
        path.unlink()
    else:
        middle = len(raw) // 2
        flipped = raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]
        path.write_bytes({"flip": flipped, "cut": raw[:-3], "empty": b""}[harm])
    second = prepare(config_of(folder, cache))
    if not (name == "meta.json" and harm == "flip"):  # a flipped space or a name outside the checks does no harm
        assert [str(entry) in note for note in second.notes if "damaged" in note] == [True]
    assert (second.train.batch(0, 8).tokens_BS == expected).all()
    assert prepare(config_of(folder, cache)).notes == first.notes


def test_a_damaged_trained_tokenizer_is_trained_again(folder, cache, tmp_path):
    first = prepare(config_of(folder, cache))
    (path,) = (cache / "tokenizers").glob("*.json")
    for content in (b"", path.read_bytes()[:-9], path.read_bytes().replace(b"merges", b"murges")):
        path.write_bytes(content)
        second = prepare(config_of(folder, cache))
        assert second.fingerprint == first.fingerprint and any("training it again" in note for note in second.notes)


def test_threads_give_the_same_tokens_as_one(folder, tmp_path, monkeypatch):
    one = build_corpus(config_of(folder, tmp_path / "one")).parts[0]
    monkeypatch.setattr(tokenise, "TASK_BYTES", 300)
    two = build_corpus(config_of(folder, tmp_path / "two", "data.workers=2")).parts[0]
    assert (one.train.tokens == two.train.tokens).all() and (one.train.starts_D == two.train.starts_D).all()


def test_a_thread_that_fails_is_an_error_and_leaves_nothing(folder, cache, monkeypatch):
    prepare(config_of(folder, cache))  # the tokenizer is there; now other tokens are wanted
    (folder / "new.txt").write_text("more")
    assemble = tokenise._assemble

    def fail(task, tokenizer):
        if any(place_of(name) == "new.txt" for name in task.names):
            raise MemoryError("no room for an encoding")
        return assemble(task, tokenizer)

    monkeypatch.setattr(tokenise, "_assemble", fail)
    monkeypatch.setattr(tokenise, "TASK_BYTES", 300)
    entries = set((cache / "tokens").iterdir())
    with pytest.raises(MemoryError, match="no room for an encoding"):
        prepare(config_of(folder, cache, "data.workers=2"))
    assert {path for path in (cache / "tokens").iterdir() if path.is_dir()} <= entries


@pytest.mark.slow
def test_two_processes_at_once_make_it_once(folder, tmp_path):
    code = (
        "import sys; from conf.load import compose; from train.data.corpus import build_corpus\n"
        "stages = set(); c = build_corpus(compose(*sys.argv[1:]), lambda stage, done, total: stages.add(stage))\n"
        "print(c.fingerprint, 'tokenising' in stages)"
    )
    overrides = ["seq_len=32", "model.vocab_size=400", f"data.path={folder}", f"data.cache={tmp_path / 'cache'}"]
    command = [sys.executable, "-c", code, *overrides]
    root = Path(corpus.__file__).resolve().parents[2]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * 3
    assert len({fingerprint for fingerprint, _ in outputs}) == 1
    assert sorted(made for _, made in outputs) == ["False", "False", "True"]


def test_parts_of_documents_make_the_same_tokens(folder, tmp_path, monkeypatch):
    (folder / "long.txt").write_text("a line that has no end and goes on " * 300)
    (folder / "zz.txt").write_text("the last one")
    whole = build_corpus(config_of(folder, tmp_path / "whole")).parts[0].whole
    monkeypatch.setattr(tokenise, "in_parts", partial(in_parts, limit=70))
    monkeypatch.setattr(tokenise, "TASK_BYTES", 300)
    parts = build_corpus(config_of(folder, tmp_path / "parts")).parts[0].whole
    for name in ("tokens", "starts_D", "lengths_D"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name)), name
    hashes = [np.load(next((tmp_path / name / "tokens").glob("*/hashes.npy"))) for name in ("whole", "parts")]
    assert np.array_equal(*hashes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_document_of_one_line_is_prepared_in_bounded_memory(tmp_path, cache, name):
    """2.6 MB, which would take 0.8 GB if they were encoded at once."""
    text = " ".join(f"{number * 7919 % 30_011:x}" for number in range(500_000))
    (tmp_path / name).write_text(text if name == "a.txt" else json.dumps({"text": text}) + "\n")
    code = (
        "import re, sys; from train.data.corpus import build_corpus; from conf.load import compose\n"
        "build_corpus(compose(*sys.argv[1:]))\n"
        # Not ru_maxrss: that begins with what the process had that started it.
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    overrides = ["model.vocab_size=400", "data.workers=2", f"data.path={tmp_path / name}", f"data.cache={cache}"]
    root = Path(corpus.__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code, *overrides], stdout=subprocess.PIPE, text=True, cwd=root)
    assert done.returncode == 0
    own = int(done.stdout) >> 10
    assert own < 250, f"{own} MiB"


def test_a_full_disk_is_an_error_and_leaves_nothing(folder, cache, tmp_path, monkeypatch):
    prepare(config_of(folder, cache))
    (folder / "new.txt").write_text("more")

    def full(self, *_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus.StoreWriter, "_finish", full)
    entries = set((cache / "tokens").iterdir())
    with pytest.raises(UserError, match="no space left") as caught:
        prepare(config_of(folder, cache))
    assert caught.value.field == "data.cache"
    assert {path for path in (cache / "tokens").iterdir() if path.is_dir()} <= entries


def test_bad_data_leaves_no_token_folder(folder, cache, tmp_path):
    (folder / "zz.txt").write_bytes(b"\xff\xfe bad")
    with pytest.raises(UserError, match="not UTF-8"):
        prepare(config_of(folder, cache))
    tokens = cache / "tokens"
    assert not tokens.exists() or not [path for path in tokens.iterdir() if path.is_dir()]


@pytest.mark.parametrize("content", [b"", b"\0binary"])
def test_data_without_text(tmp_path, cache, content):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a").write_bytes(content)
    for overrides in ([], [f"data.tokenizer={tmp_path / 'tokenizer.json'}"]):
        with pytest.raises(UserError, match="has no text") as caught:
            prepare(config_of(tmp_path / "empty", cache, *overrides))
        assert ("binary" in caught.value.rule) == bool(content)
        (tmp_path / "tokenizer.json").write_text(train_bpe(["ab"], 300), encoding="utf-8")


def test_a_cache_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written") as caught:
        prepare(config_of(folder, tmp_path / "file" / "cache"))
    assert caught.value.field == "data.cache"


def test_a_token_folder_is_data_by_itself(folder, cache, tmp_path):
    first = prepare(config_of(folder, cache))
    (entry,) = (path for path in (cache / "tokens").iterdir() if path.is_dir())
    moved = entry.rename(tmp_path / "moved")
    second, stages = stages_of(config_of(moved, cache))
    assert stages == [] and second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert (second.train.batch(0, 8).tokens_BS == first.train.batch(0, 8).tokens_BS).all()

    raw = (moved / "tokens.bin").read_bytes()
    meta = json.loads((moved / "meta.json").read_text())
    with pytest.raises(UserError, match=r"model\.vocab_size"):
        prepare(config_of(moved, cache, "model.vocab_size=300"))
    (moved / "tokens.bin").write_bytes(np.uint16(60000).tobytes() + raw[2:])
    with pytest.raises(UserError, match="is damaged"):
        prepare(config_of(moved, cache))
    del meta["crc32"]
    (moved / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="has token 60000"):
        prepare(config_of(moved, cache))
    (moved / "tokens.bin").write_bytes(raw)
    plain = prepare(config_of(moved, cache))  # checksums are for those who want them
    assert (plain.train.batch(0, 8).tokens_BS == first.train.batch(0, 8).tokens_BS).all()
    (moved / "meta.json").write_text(json.dumps(meta | {"tokenizer": "other"}))
    with pytest.raises(UserError, match="another tokenizer"):
        prepare(config_of(moved, cache))
    (moved / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer.json"):
        prepare(config_of(moved, cache))
    with pytest.raises(UserError, match="no such folder"):
        prepare(config_of(tmp_path / "absent", cache, "data.format=memmap", "data.path=set_below"))


def test_a_large_token_folder_is_read_through_once(folder, cache, monkeypatch):
    monkeypatch.setattr("train.data.token_store.ALWAYS_CHECKED", 100)
    prepare(config_of(folder, cache))
    (entry,) = (path for path in (cache / "tokens").iterdir() if path.is_dir())
    checksum, sizes = zlib.crc32, []
    monkeypatch.setattr(
        "zlib.crc32", lambda data, crc=0: sizes.append(getattr(data, "nbytes", 0)) or checksum(data, crc)
    )
    size = (entry / "tokens.bin").stat().st_size

    def notes() -> str:
        sizes.clear()
        return " ".join(prepare(config_of(folder, cache)).notes)

    assert "damaged" not in notes() and size not in sizes
    os.utime(entry / "tokens.bin", (1e9, 1e9))  # as after a copy: read once more, then remembered
    assert "damaged" not in notes() and size in sizes
    assert "damaged" not in notes() and size not in sizes
    raw = bytearray((entry / "tokens.bin").read_bytes())
    raw[50] ^= 1
    (entry / "tokens.bin").write_bytes(raw)
    assert "damaged" in notes()


def test_a_mix_takes_its_shares_from_each_source(folder, cache, tmp_path):
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": f"ZZZ {number} ZZZ"}) + "\n" for number in range(50)))
    mix = f"data.mix=[{{path:{folder},weight:3}},{{path:{tmp_path / 'b.jsonl'},weight:1,text_key:body}}]"
    prepared = prepare(config_of(None, cache, mix, "log.validation_sequences=8"))
    batch = prepared.train.batch(1000, 200).tokens_BS
    from_b = ["ZZZ" in prepared.tokenizer.decode(row.tolist()) for row in batch]
    assert sum(from_b) == 50
    held_out = ["ZZZ" in prepared.tokenizer.decode(row.tolist()) for row in prepared.validation.batch(0, 8).tokens_BS]
    assert 1 <= sum(held_out) <= 2 and len(prepared.train.epochs(100)) == 2


def test_text_that_is_read_again_is_told(folder, cache):
    data = prepare(config_of(folder, cache)).train
    (name,) = data.epochs(0)
    once = next(samples for samples in range(10**6) if data.epochs(samples)[name] > 1)
    assert name == str(folder) and data.repeats(once - 1) is None and f"{folder} 2" in data.repeats(2 * once)
    assert data.read_once(once - 8, once) == [name]
    assert data.read_once(once, once + 8) == data.read_once(0, once - 1) == []


def test_too_small_a_vocabulary(folder, cache):
    with pytest.raises(UserError, match="260 ids or more"):
        prepare(config_of(folder, cache, "model.vocab_size=259"))


def test_prefetch_gives_batches_in_order_and_errors_in_place(folder, cache):
    prepared = prepare(config_of(folder, cache))
    plan = [(0, 4), (4, 2), (6, 8)]
    with Prefetch(prepared.train.batch, plan) as batches:
        found = list(batches)
    assert [len(batch.tokens_BS) for batch in found] == [4, 2, 8]
    assert (found[1].tokens_BS == prepared.train.batch(4, 2).tokens_BS).all()

    def broken():
        yield 0, 1
        raise RuntimeError("the plan broke")

    batches = Prefetch(prepared.train.batch, broken())
    assert len(next(batches).tokens_BS) == 1
    with pytest.raises(RuntimeError, match="the plan broke"):
        next(batches)
    assert list(batches) == []
    batches.close()


def test_prefetch_works_ahead_counts_waiting_and_stops():
    made = []

    def slow(first: int, count: int) -> int:
        time.sleep(0.05)
        made.append(first)
        return first

    batches = Prefetch(slow, ((first, 1) for first in range(10**9)))
    assert [next(batches) for _ in range(3)] == [0, 1, 2] and batches.waited > 0.1
    deadline = time.monotonic() + 60
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    waited = batches.waited
    assert 5 <= len(made) <= 6 and next(batches) == 3 and batches.waited - waited < 0.04
    batches.close()
    alive = [thread for thread in threading.enumerate() if thread.name.startswith("data")]
    assert not alive and list(batches) == []


def test_short_documents_are_left_out_and_those_held_out_stay_the_same(folder, cache):
    every, long = (prepare(config_of(folder, cache, f"data.min_tokens={least}")) for least in (0, 60))
    assert long.fingerprint == every.fingerprint  # the key itself is told where a run goes on with another one
    assert any("data.min_tokens = 60 keeps" in note and "of 40 documents" in note for note in long.notes)
    parts = [build_corpus(config_of(folder, cache, f"data.min_tokens={least}")).parts[0] for least in (0, 60)]
    for side in ("train", "validation", "whole"):
        before, after = (getattr(part, side) for part in parts)
        kept = [pair for pair in zip(before.starts_D, before.lengths_D, strict=True) if pair[1] >= 60]
        assert kept == list(zip(after.starts_D, after.lengths_D, strict=True)) and 0 < len(kept) < len(before)


def test_a_length_that_leaves_no_document_is_refused_with_the_longest(folder, cache):
    with pytest.raises(UserError, match="the longest has") as caught:
        build_corpus(config_of(folder, cache, "data.min_tokens=100000"))
    assert caught.value.field == "data.min_tokens"
    longest = int(caught.value.cure.split()[1])
    assert build_corpus(config_of(folder, cache, f"data.min_tokens={longest}"))
    with pytest.raises(UserError, match="the longest has"):
        build_corpus(config_of(folder, cache, f"data.min_tokens={longest + 1}"))
