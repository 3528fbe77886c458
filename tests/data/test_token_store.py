"""A token folder while it is written in pieces, and while it is read, with all kinds of damage."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from train.data.token_store import DamagedStore, StoreWriter, TokenStore, open_store


def write(path: Path, vocab_size: int = 100, supervised: bool = False) -> None:
    """Four documents of 3, 4, 1 and 2 tokens: the second comes in two pieces, and an empty one stands before the last."""
    mask = (lambda *learnt: np.array(learnt, dtype=np.uint8)) if supervised else (lambda *_: None)
    with StoreWriter(path, vocab_size, "{}", "print", supervised=supervised) as writer:
        for ids, lengths, hashes, continues, learnt in (
            ([1, 2, 3, 4], [3, 1], [10, 11], False, mask(0, 1, 1, 0)),
            ([5, 6], [2], [11], True, mask(1, 1)),
            ([7, 8, 99, 9], [1, 1, 0, 2], [11, 12, 13, 14], True, mask(0, 0, 1, 0)),
        ):
            lengths_D, hashes_D = np.array(lengths, dtype=np.int64), np.array(hashes, dtype=np.uint64)
            writer.append(np.array(ids, dtype=np.uint32), lengths_D, hashes_D, 2 * len(ids), continues, learnt)


def opened(path: Path) -> TokenStore:
    return open_store(path, path.parent / "marks")


@pytest.mark.parametrize("vocab_size", [1 << 16, (1 << 16) + 1])
def test_documents_are_read_as_they_were_written(tmp_path, vocab_size):
    write(tmp_path / "tokens", vocab_size)
    store = opened(tmp_path / "tokens")
    assert store.tokens_N.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 99, 9]
    assert store.tokens_N.dtype == (np.uint16 if vocab_size == 1 << 16 else np.uint32)
    assert store.offsets_D1.tolist() == [0, 3, 7, 8, 10], "the empty one is left out"
    assert store.hashes_D.tolist() == [10, 11, 12, 14]
    assert (store.largest_id, store.meta["text_bytes"], store.supervised_N) == (99, 20, None)


def test_what_is_learnt_stands_beside_each_token(tmp_path):
    write(tmp_path / "tokens", supervised=True)
    assert opened(tmp_path / "tokens").supervised_N.tolist() == [0, 1, 1, 0, 1, 1, 0, 0, 1, 0]


def test_what_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), StoreWriter(tmp_path / "tokens", 100, "{}", "print"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({"version": 2}, "version 2"),
        ({"dtype": "int32"}, "dtype int32"),
        ({"tokens": 9}, "not 18"),
        ({"documents": 3}, "do not divide"),
        ({"crc32": []}, "not an object"),
        ({"crc32": {"tokens.bin": 1}}, r"tokens\.bin does not have the checksum"),
        ({"crc32": {"hashes.npy": 1}}, r"hashes\.npy does not have the checksum"),
        ({"crc32": {"absent": 1}}, "absent does not have"),
    ],
)
def test_what_does_not_fit_is_damage(tmp_path, meta, words):
    write(tmp_path / "tokens")
    path = tmp_path / "tokens" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | meta))
    with pytest.raises(DamagedStore, match=words):
        opened(tmp_path / "tokens")


@pytest.mark.parametrize(("offsets", "fits"), [([0, 3, 7, 8, 10], True), ([1, 3, 7, 8, 10], False),
                                               ([0, 3, 3, 8, 10], False), ([0, 3, 7, 8, 9], False)])  # fmt: skip
def test_documents_divide_the_tokens(tmp_path, offsets, fits):
    write(tmp_path / "tokens")
    folder = tmp_path / "tokens"
    np.save(folder / "documents.npy", np.array(offsets))
    (folder / "meta.json").write_text(json.dumps(json.loads((folder / "meta.json").read_text()) | {"crc32": {}}))
    if fits:
        assert opened(folder).offsets_D1.tolist() == offsets
    else:
        with pytest.raises(DamagedStore, match="do not divide"):
            opened(folder)


def test_masks_that_are_too_short_are_damage(tmp_path):
    write(tmp_path / "tokens", supervised=True)
    folder = tmp_path / "tokens"
    (folder / "supervised.bin").write_bytes(bytes(9))
    meta = json.loads((folder / "meta.json").read_text())
    meta["crc32"]["supervised.bin"] = zlib.crc32(bytes(9))
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DamagedStore, match="has 9 bytes, not 10"):
        opened(folder)
