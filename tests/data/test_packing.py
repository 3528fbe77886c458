"""The closed forms of packing against streams built token by token."""

import numpy as np
import pytest

from train.data.dataset import Schedule
from train.data.packing import Documents, Stream
from train.data.shuffle import key, permute_N, shuffled_D

EOS, FIM = 1, (2, 3, 4)


def make_documents(lengths: list[int]) -> Documents:
    """Documents whose token ids are all different and above the special ones."""
    lengths_D = np.array(lengths, dtype=np.int64)
    starts_D = np.cumsum(lengths_D) - lengths_D
    return Documents(np.arange(10, 10 + lengths_D.sum()).astype(np.uint16), starts_D, lengths_D)


def read(stream: Stream, first: int, count: int) -> tuple[list[int], list[int]]:
    tokens, numbers = np.empty(count, np.int64), np.empty(count, np.int32)
    stream.read(first, tokens, numbers)
    return tokens.tolist(), numbers.tolist()


def documents_in(tokens: list[int]) -> list[list[int]]:
    """The stream cut after each eos."""
    found, current = [], []
    for token in tokens:
        current.append(token)
        if token == EOS:
            found.append(current)
            current = []
    assert not current
    return found


def undo_fim(document: list[int]) -> list[int]:
    """The document as it was, from begin, prefix, hole, suffix, end, middle, eos."""
    if document[0] != FIM[0]:
        return document
    hole, end = document.index(FIM[1]), document.index(FIM[2])
    return document[1:hole] + document[end + 1 : -1] + document[hole + 1 : end] + [EOS]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_every_epoch_holds_every_document_once_and_the_right_number_of_fim(rate):
    documents = make_documents([3, 1, 40, 7, 7, 12, 2])
    stream = Stream(documents, 8, EOS, seed=5, fim=FIM, fim_rate=rate)
    originals = sorted(
        [*range(10 + start, 10 + start + length), EOS]
        for start, length in zip(documents.starts_D.tolist(), documents.lengths_D.tolist(), strict=True)
    )
    orders, moved = [], 0
    for epoch in range(12):
        start, stop = stream.tokens_before(epoch), stream.tokens_before(epoch + 1)
        tokens, _ = read(stream, start, stop - start)
        found = documents_in(tokens)
        moved += sum(document[0] == FIM[0] for document in found)
        plain = [undo_fim(document) for document in found]
        assert sorted(plain) == originals
        orders.append(tuple(document[0] for document in plain))
    assert moved == int(12 * 7 * rate)
    assert len(set(orders)) > 6  # 12 shuffles of 7
    assert stream.sequences == pytest.approx(stream.tokens_before(1000) / 1000 / 8, rel=1e-3)  # of an epoch, on average


@pytest.mark.parametrize("lengths, seq_len", [([3, 1, 40, 7], 8), ([1, 2], 16), ([100], 7), ([5] * 50, 4)])
def test_samples_of_an_epoch_are_its_windows_and_every_token_is_a_target_once(lengths, seq_len):
    stream = Stream(make_documents(lengths), seq_len, EOS, seed=3, fim=FIM, fim_rate=0.3)
    epochs = 6
    samples = stream.samples_before(epochs)
    windows = stream.windows_N(np.arange(samples))
    assert sorted(windows.tolist()) == list(range(samples))
    for epoch in range(epochs):
        own = windows[stream.samples_before(epoch) : stream.samples_before(epoch + 1)] * seq_len
        assert ((own >= stream.tokens_before(epoch)) & (own < stream.tokens_before(epoch + 1))).all()
    whole, _ = read(stream, 0, samples * seq_len + 1)
    for window in windows.tolist():
        assert (
            read(stream, window * seq_len, seq_len + 1)[0] == whole[window * seq_len : window * seq_len + seq_len + 1]
        )
    for epoch in range(epochs):  # the shuffle never leaves the epoch
        first, stop = stream.samples_before(epoch), stream.samples_before(epoch + 1)
        assert set(windows[first:stop].tolist()) == set(range(first, stop))


def test_cuts_of_fim_reach_from_the_beginning_to_the_end():
    """A document of one token stands before the hole, in it or behind it."""
    stream = Stream(make_documents([1]), 8, EOS, seed=5, fim=FIM, fim_rate=1.0)
    begin, hole, end = FIM
    found = {tuple(read(stream, stream.tokens_before(epoch), 5)[0]) for epoch in range(40)}
    assert found == {(begin, 10, hole, end, EOS), (begin, hole, end, 10, EOS), (begin, hole, 10, end, EOS)}


def test_a_sample_depends_on_seed_and_index_only():
    documents = make_documents([30, 20, 11, 5, 60])
    one, other = (Stream(documents, 8, EOS, seed=3, fim=FIM, fim_rate=0.5) for _ in range(2))
    late = one.windows_N(np.array([10**6]))
    assert (other.windows_N(np.arange(10**6 - 5, 10**6 + 5))[5] == late).all()
    assert read(one, int(late[0]) * 8, 9) == read(other, int(late[0]) * 8, 9)
    differently = Stream(documents, 8, EOS, seed=4, fim=FIM, fim_rate=0.5)
    assert read(differently, 0, 60) != read(one, 0, 60)


def test_document_numbers_change_after_eos():
    stream = Stream(make_documents([3, 1, 6, 2]), 40, EOS, seed=1)
    tokens, numbers = read(stream, 2, 41)
    assert numbers[0] == 0
    steps = np.diff(numbers)
    assert (steps == (np.array(tokens[:-1]) == EOS)).all()


@pytest.mark.parametrize(("length", "whole"), [(31, 3), (32, 4), (33, 4)])
def test_a_whole_window_has_a_token_behind_it(length, whole):
    """Of a text with eos: a window of 8 tokens and the target of the last one lie in the first epoch."""
    assert Stream(make_documents([length]), 8, EOS, seed=1).whole_windows == whole


def test_the_billionth_sample_is_cheap_and_inside():
    stream = Stream(make_documents([300, 20]), 8, EOS, seed=3)
    samples = np.arange(10**12, 10**12 + 64)
    windows = stream.windows_N(samples)
    assert abs(windows - samples).max() <= 322 // 8 + 1  # the same epoch
    assert len(read(stream, int(windows[0]) * 8, 9)[0]) == 9


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_permutations_are_permutations_and_far_from_the_identity(size):
    images = permute_N(key(1, 2), np.arange(size), size)
    assert sorted(images.tolist()) == list(range(size))
    assert sorted(shuffled_D(7, size).tolist()) == list(range(size))
    if size >= 1000:
        assert abs(np.corrcoef(images, np.arange(size))[0, 1]) < 0.1
        assert (permute_N(key(1, 3), np.arange(size), size) == images).mean() < 0.01


def test_orders_are_those_of_earlier_versions():
    """A run that goes on under a later version has read the first samples of an order that must be the same."""
    assert (key(0), key(1, 2, 3)) == (10451216379200822465, 7427000763270697089)
    assert shuffled_D(key(5, 0, 0), 10).tolist() == [0, 4, 2, 8, 9, 6, 3, 7, 5, 1]
    assert permute_N(key(5, 0, 1), np.arange(10), 10).tolist() == [4, 7, 6, 8, 0, 1, 2, 5, 9, 3]
    assert permute_N(key(5, 0, 1), np.arange(2), 2).tolist() == [1, 0]
    assert permute_N(key(5, 0, 1), np.array([0, 10**9]), 10**12).tolist() == [72717185363, 781524452942]


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.5], [0.7, 0.2, 0.1], [1e-4, 3.0, 2.5, 0.3], [3.0, 1e-2]])
def test_a_mix_keeps_its_shares_at_every_point(weights):
    schedule, samples = Schedule(weights), 3000
    taken = schedule.assign(0, samples)
    seen = np.zeros(samples, dtype=int)
    for source, (rows, places) in enumerate(taken):
        assert places.tolist() == list(range(len(places)))  # each source's own samples come in order, none skipped
        seen[rows] += 1
        share = weights[source] / sum(weights)
        had = np.cumsum(np.isin(np.arange(samples), rows))
        assert abs(had - share * np.arange(1, samples + 1)).max() <= len(weights)
    assert (seen == 1).all()
    assert [len(rows) for rows, _ in taken] == schedule.counts(samples)
    parts = [schedule.assign(first, 7) for first in range(700, 770, 7)]  # any grouping gives the same samples
    whole = schedule.assign(700, 70)
    for source in range(len(weights)):
        assert np.concatenate([part[source][1] for part in parts]).tolist() == whole[source][1].tolist()
