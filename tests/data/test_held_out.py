"""Which documents are held out, by hashes and bytes that are given."""

from types import SimpleNamespace

import numpy as np
import pytest

from train.data import held_out
from train.data.held_out import held_out_D, long_documents, split_documents, training_texts
from train.data.sources import hash_id


def test_hashes_below_the_fraction_are_held_out_and_each_side_has_one():
    hashes = np.array(
        [2**61, 2**62, 2**63, 3 * 2**62], dtype=np.uint64
    )  # an eighth, a quarter, a half and three quarters
    for fraction, expected in (
        (0.3, [True, True, False, False]),
        (0.25, [True, False, False, False]),
        (0.01, [True, False, False, False]),
        (0.99, [True, True, True, False]),
    ):
        assert held_out_D(hashes, fraction).tolist() == expected, fraction
        assert held_out_D(hashes[::-1], fraction).tolist() == expected[::-1]


@pytest.mark.parametrize("at_once", [1 << 20, 3, 4])
@pytest.mark.parametrize(("fraction", "cut"), [(0.5, 4), (0.1, 9), (0.95, 1), (0.001, 9)])
def test_of_one_document_the_last_part_of_its_bytes_is_held_out(monkeypatch, at_once, fraction, cut):
    """Ten tokens of 4, 4, 4, 4, 2, 2, 2, 2, 2 and 6 bytes, looked at a few at a time. Each side gets one at least."""
    monkeypatch.setattr(held_out, "TOKENS_AT_ONCE", at_once)
    tokens = np.array([4] * 4 + [2] * 5 + [6])
    store = SimpleNamespace(offsets_D1=np.array([0, 10]), tokens_N=tokens, supervised_N=None, hashes_D=None)
    train, validation = split_documents(store, SimpleNamespace(bytes_V=np.arange(7)), fraction)
    assert (train.starts_D.tolist(), train.lengths_D.tolist()) == ([0], [cut])
    assert (validation.starts_D.tolist(), validation.lengths_D.tolist()) == ([cut], [10 - cut])
    assert len(long_documents(train, cut)) == 1 and len(long_documents(train, cut + 1)) == 0


def test_a_tokenizer_is_trained_on_no_text_that_is_held_out():
    """Of one document on its first part; of several on as many as give the wanted characters, without those held out."""
    alone = SimpleNamespace(sample=lambda limit: iter([("a", "x" * 60 + "y" * 40)]))
    assert list(training_texts([alone], 1000, 0.4)) == ["x" * 60]
    names = [f"document {number}" for number in range(100)]
    held = [name for name in names if hash_id(name) < 0.5 * 2**64]
    many = SimpleNamespace(sample=lambda limit: ((name, name.ljust(20, ".")) for name in names))
    texts = [text.rstrip(".") for text in training_texts([many, many], 400, 0.5)]
    kept = [name for name in names if name not in held][: 200 // 20]
    assert texts == kept * 2 and any(names.index(name) < names.index(kept[-1]) for name in held)
