"""Chooses the documents that are held out for validation.

A document is held out if the hash of its stable id is below validation_fraction of the hash range. Training and
validation get at least one document each. A single document is cut in two.

D = documents.
"""

from collections.abc import Iterator

import numpy as np

from train.data.packing import Documents
from train.data.sources import DocumentSource, hash_id, no_text
from train.data.token_store import TokenStore
from train.data.tokenizer import Tokenizer

TOKENS_AT_ONCE = 1 << 20
"""Number of tokens that are read at a time."""
LONGEST_DOCUMENT = 16 << 20
"""Maximum characters of a document to train a tokenizer on."""


def held_out_D(hashes_D: np.ndarray, fraction: float) -> np.ndarray:
    """Returns which documents are held out (bool). hashes_D: at least two."""
    held_D = hashes_D < np.uint64(fraction * 2**64)
    if not held_D.any():
        held_D[hashes_D.argmin()] = True
    if held_D.all():
        held_D[hashes_D.argmax()] = False
    return held_D


def split_documents(store: TokenStore, tokenizer: Tokenizer, fraction: float) -> tuple[Documents, Documents]:
    """Returns training and held-out documents of a token folder."""
    starts_D, lengths_D = store.offsets_D1[:-1], np.diff(store.offsets_D1)
    if len(starts_D) == 1:
        cut = _cut(store.tokens_N, tokenizer.bytes_V, fraction)
        starts_D, lengths_D = np.array([0, cut]), np.array([cut, len(store.tokens_N) - cut])
        held_D = np.array([False, True])
    else:
        held_D = held_out_D(store.hashes_D, fraction)
    mask_N = store.supervised_N
    sides = (Documents(store.tokens_N, starts_D[side_D], lengths_D[side_D], mask_N) for side_D in (~held_D, held_D))
    train, validation = sides
    return train, validation


def all_documents(store: TokenStore) -> Documents:
    """Returns all documents of a token folder. A single document stays whole."""
    return Documents(store.tokens_N, store.offsets_D1[:-1], np.diff(store.offsets_D1), store.supervised_N)


def long_documents(documents: Documents, least: int) -> Documents:
    """Returns the documents that have at least `least` tokens."""
    long_D = documents.lengths_D >= least
    return Documents(documents.tokens, documents.starts_D[long_D], documents.lengths_D[long_D], documents.supervised)


def _cut(tokens_N: np.ndarray, bytes_V: np.ndarray, fraction: float) -> int:
    """Returns how many tokens of a single document are for training."""
    chunks = [slice(first, first + TOKENS_AT_ONCE) for first in range(0, len(tokens_N), TOKENS_AT_ONCE)]
    ends = np.cumsum([bytes_V[tokens_N[chunk]].sum() for chunk in chunks])
    goal = (1 - fraction) * ends[-1]
    chunk = min(int(np.searchsorted(ends, goal, side="right")), len(chunks) - 1)
    ends_N = np.cumsum(bytes_V[tokens_N[chunks[chunk]]]) + (ends[chunk - 1] if chunk else 0)
    cut = chunk * TOKENS_AT_ONCE + int(np.searchsorted(ends_N, goal, side="right"))
    return min(max(cut, 1), len(tokens_N) - 1)


def training_texts(sources: list[DocumentSource], limit: int, fraction: float) -> Iterator[str]:
    """Yields about `limit` bytes of training documents, from all sources."""
    for source in sources:
        documents = _enough(source.sample(limit // len(sources)), limit // len(sources), fraction)
        if not documents:
            raise no_text(source)
        if len(documents) == 1:
            raw = documents[0][1].encode()
            yield raw[: int((1 - fraction) * len(raw))].decode("utf-8", "ignore")
            continue
        held_D = held_out_D(np.array([hash_id(name) for name, _ in documents], dtype=np.uint64), fraction)
        yield from (text for (_, text), held in zip(documents, held_D, strict=True) if not held)


def _enough(documents: Iterator[tuple[str, str]], limit: int, fraction: float) -> list[tuple[str, str]]:
    """Returns the first documents, until the training documents among them have `limit` characters."""
    taken, size = [], 0
    for name, text in documents:
        text = text[:LONGEST_DOCUMENT]
        taken.append((name, text))
        size += len(text) if hash_id(name) >= fraction * 2**64 else 0
        if size >= limit:
            break
    return taken
