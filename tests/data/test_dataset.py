"""What training and validation read from given documents: which windows, which sources, which bytes."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from conf.load import compose
from conf.schema import DataFormat
from tests.data.test_packing import make_documents
from train.data.dataset import TrainingData, ValidationData
from train.data.packing import Stream

EOS = 1
BYTES = np.arange(2000) % 7
"""Bytes of text of each token."""


def corpus_of(*weights: float, lengths: list[int], chats: bool = False) -> SimpleNamespace:
    """Sources with the same documents; of chats every third token is learnt."""
    documents = make_documents(lengths)
    if chats:
        documents = replace(documents, supervised=(np.arange(len(documents.tokens)) % 3 == 0).astype(np.uint8))
    tokenizer = SimpleNamespace(eos_id=EOS, fim_ids=(2, 3, 4), bytes_V=BYTES)
    parts = [
        SimpleNamespace(name=f"source {number}", weight=weight, train=documents, validation=documents)
        for number, weight in enumerate(weights)
    ]
    return SimpleNamespace(parts=parts, tokenizer=tokenizer)


def config_of(*words: str, chats: bool = False):
    config = compose("seq_len=16", *words)
    return replace(config, data=replace(config.data, format=DataFormat.chat)) if chats else config


def test_validation_reads_places_that_are_spread_over_all_of_the_text():
    corpus, config = corpus_of(1.0, lengths=[30] * 20), config_of("log.validation_sequences=4")
    found = ValidationData(corpus, config)
    stream = Stream(corpus.parts[0].validation, 16, EOS, 0, None, 0.0)
    whole = stream.whole_windows
    assert whole == 20 * 31 // 16 and len(found) == 4 and not found.notes
    expected = np.empty((4, 17), np.int64)
    for row in range(4):
        stream.read(whole * row // 4 * 16, expected[row], None)
    assert found.batch(0, 4).tokens_BS.tolist() == expected.tolist()
    assert found.batch(2, 9).tokens_BS.tolist() == expected[2:].tolist(), "fewer at the end"


def test_bytes_are_those_of_the_targets_that_are_learnt():
    corpus, config = corpus_of(1.0, lengths=[9, 12, 5], chats=True), config_of(chats=True)
    data = ValidationData(corpus, config)
    batch = data.batch(0, len(data))
    expected = 0
    for tokens, learnt, numbers in zip(
        batch.tokens_BS.tolist(), batch.supervised_BS.tolist(), batch.documents_BS.tolist(), strict=True
    ):
        for place in range(1, 17):
            if learnt[place] and numbers[place] == numbers[place - 1]:  # the first token of a chat is nobody's target
                expected += int(BYTES[tokens[place]])
    assert data.text_bytes(batch) == expected > 0
    plain = ValidationData(corpus_of(1.0, lengths=[40, 40]), config_of())
    tokens = plain.batch(0, 1).tokens_BS[0].tolist()
    assert plain.text_bytes(plain.batch(0, 1)) == sum(int(BYTES[token]) for token in tokens[1:])


def test_sources_with_the_same_text_come_in_orders_of_their_own():
    corpus, config = corpus_of(1.0, 1.0, lengths=[16 - 1] * 40), config_of()
    batch = TrainingData(corpus, config).batch(0, 40).tokens_BS
    first, second = batch[1::2].tolist(), batch[::2].tolist()
    assert first != second and len({tuple(row) for row in first}) == len(first) == 20
    other = TrainingData(corpus, replace(config, seed=config.seed + 1)).batch(0, 40).tokens_BS
    assert other[1::2].tolist() not in (first, second), "the seed of one source is not that of another in the next run"


def test_samples_are_those_of_earlier_versions():
    """A run that goes on under a later version reads what it has not read: orders, cuts of FIM and packed chats stay as they are."""
    mix, config = corpus_of(2.0, 1.0, lengths=[9, 30, 21, 3, 14]), config_of("seed=5")
    data = TrainingData(mix, replace(config, data=replace(config.data, fim_rate=0.5)))
    begins = [[15, 1, 49], [80, 81, 82], [39, 40, 41], [73, 74, 75], [53, 54, 1], [27, 28, 29]]
    assert data.batch(0, 6).tokens_BS[:, :3].tolist() == begins
    assert data.batch(10**9, 1).tokens_BS[0, :8].tolist() == [21, 22, 23, 24, 3, 27, 28, 29]
    chats = TrainingData(corpus_of(1.0, lengths=[9, 12, 5, 3, 8, 4], chats=True), config_of("seed=5", chats=True))
    assert [int(chats.batch(sample, 1).tokens_BS[0, 0]) for sample in (0, 1, 2, 3, 100)] == [19, 10, 47, 47, 19]


def test_a_batch_counts_chats_or_else_sequences():
    chats = ValidationData(corpus_of(1.0, lengths=[9, 12, 5], chats=True), config_of(chats=True)).batch(0, 9)
    assert len(chats.tokens_BS) == 2 and chats.sequences == 3
    plain = TrainingData(corpus_of(1.0, lengths=[9, 12, 5]), config_of("data.mask_documents=true")).batch(0, 4)
    assert (plain.sequences, plain.targets) == (4, 4 * 16)


@pytest.mark.parametrize("seen", [0, 1])
def test_a_second_reading_begins_behind_the_last_sample_of_the_first(seen):
    corpus, config = corpus_of(1.0, lengths=[16] * 8, chats=True), config_of(chats=True)
    data = TrainingData(corpus, config)
    once = int(data.sequences)
    assert once == 8 and data.repeats(once) is None and "source 0 1.12 times" in data.repeats(once + 1)
    assert data.read_once(once - seen, once + 1) == ["source 0"]
    assert data.read_once(once - 1, once) == [] == data.read_once(once + 1, once + 2)
