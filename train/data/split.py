"""Which documents are held out for validation.

A document is held out when the hash of its stable id is below validation_fraction of the range: adding documents never
moves another one to the other side. Each side gets at least one. A corpus of a single document is cut in two: the last
part of its bytes is held out.

D = documents.
"""

from collections.abc import Iterator

import numpy as np

from train.data.files import hash_id
from train.data.packing import Documents
from train.data.sources import Source, no_text
from train.data.store import TokenStore
from train.data.tokenizer import Tokenizer


def held_out_D(hashes_D: np.ndarray, fraction: float) -> np.ndarray:
    """Whether each of two or more documents is held out (bool)."""
    held_D = hashes_D < np.uint64(fraction * 2**64)
    if not held_D.any():
        held_D[hashes_D.argmin()] = True
    if held_D.all():
        held_D[hashes_D.argmax()] = False
    return held_D


def split(store: TokenStore, tokenizer: Tokenizer, fraction: float) -> tuple[Documents, Documents]:
    """Training and held-out documents of a token folder."""
    starts_D, lengths_D = store.offsets_D1[:-1], np.diff(store.offsets_D1)
    if len(starts_D) == 1:
        cut = _cut(tokenizer.bytes_V[store.tokens_N], fraction)
        starts_D, lengths_D = np.array([0, cut]), np.array([cut, len(store.tokens_N) - cut])
        held_D = np.array([False, True])
    else:
        held_D = held_out_D(store.hashes_D, fraction)
    return tuple(Documents(store.tokens_N, starts_D[side_D], lengths_D[side_D]) for side_D in (~held_D, held_D))


def all_documents(store: TokenStore) -> Documents:
    """The documents of a token folder, undivided."""
    return Documents(store.tokens_N, store.offsets_D1[:-1], np.diff(store.offsets_D1))


def _cut(bytes_N: np.ndarray, fraction: float) -> int:
    """Tokens that stay for training: as many as lie whole in the first part of the bytes; at least one on each side."""
    ends_N = np.cumsum(bytes_N)
    return int(np.clip(np.searchsorted(ends_N, (1 - fraction) * ends_N[-1], side="right"), 1, len(bytes_N) - 1))


def training_texts(sources: list[Source], limit: int, fraction: float) -> Iterator[str]:
    """Texts of training documents from all over the sources, of about `limit` bytes, to train a tokenizer on."""
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
    """The first documents, until those for training have `limit` characters."""
    taken, size = [], 0
    for name, text in documents:
        taken.append((name, text))
        size += len(text) if hash_id(name) >= fraction * 2**64 else 0
        if size >= limit:
            break
    return taken
