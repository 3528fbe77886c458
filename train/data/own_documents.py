"""Reads documents from user code (data.source), pass after pass over the source.

A document's index within its pass decides whether it is held out.
D = documents.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conf.errors import UserError
from conf.own_code import TARGET, make
from conf.schema import Config
from train.data.packing import Documents
from train.data.prepare_progress import ReportProgress
from train.data.sources import hash_id
from train.data.tokenizer import Tokenizer, in_parts

KEY = "data.source"
LOOKED_AT = 16
"""Number of first documents whose content identifies the data."""
END = object()


@dataclass(frozen=True)
class StreamMark:
    """A position in the stream at which a sample begins."""

    sample: int = 0
    """Index of the sample."""
    passes: int = 0
    """Number of completed passes over the source."""
    document: int = 0
    """Index of the document with the sample's first token, counted from the start of the pass."""
    skip: int = 0
    """Tokens before the sample's first token in this document."""
    pass_samples: int = 0
    """Number of samples in the first pass over the source; 0 until this pass has ended."""
    state: str | None = None
    """The source's state_dict before this document, as JSON, or None."""


class OwnDocument(NamedTuple):
    """A document with its position in the stream."""

    passes: int
    number: int
    state: str | None
    content: Any


class OwnDocuments:
    """The documents of data.source as a `DocumentSource`, which also tokenises them."""

    field = KEY
    size = 1 << 21
    """Characters to train a tokenizer on; fixed, because sources may be endless."""

    def __init__(self, config: Config, tokenizer: Tokenizer | None = None):
        """tokenizer: tokenises the documents; None if it is not trained yet."""
        assert config.data.source
        self._section, self._fraction = config.data.source, config.data.validation_fraction
        self.name: str = self._section[TARGET]
        self._tokenizer, self._rows = tokenizer, config.model.vocab_size

    def walk(self, mark: StreamMark = StreamMark()) -> Iterator[OwnDocument]:
        """Yields the documents from `mark` on, without end."""
        source = make(KEY, self._section)
        says_state = hasattr(source, "state_dict")
        passes, number = mark.passes, 0
        if mark.state is not None:
            source.load_state_dict(json.loads(mark.state))
            number = mark.document
        while True:
            documents = iter(source() if isinstance(source, functools.partial) else source)
            while True:
                state = json.dumps(source.state_dict()) if says_state else None
                if (content := next(documents, END)) is END:
                    break
                if passes > mark.passes or number >= mark.document:
                    yield OwnDocument(passes, number, state, content)
                number += 1
            if number == 0:
                raise ValueError(f"{KEY} gives no documents")
            passes, number = passes + 1, 0

    def is_held_out(self, document: OwnDocument) -> bool:
        return hash_id(str(document.number)) < self._fraction * 2**64

    def tokens(self, document: OwnDocument) -> np.ndarray:
        """Returns token ids and eos of a document (int64); empty without text."""
        assert self._tokenizer is not None
        if isinstance(document.content, str):
            ids = [id for part in self._tokenizer.encode_batch(list(in_parts(document.content))) for id in part]
        else:
            ids = np.asarray(document.content)
            what = f"document {document.number} of {KEY}"
            if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
                raise TypeError(f"{what} is {type(document.content).__name__} and not text or a sequence of token ids")
            if ids.size and not 0 <= ids.min() <= ids.max() < self._rows:
                raise ValueError(
                    f"{what} has token ids from {ids.min()} to {ids.max()}; the valid range is 0 to {self._rows - 1}"
                )
        return np.append(ids, self._tokenizer.eos_id).astype(np.int64) if len(ids) else np.empty(0, np.int64)

    def held_out(self, wanted: int) -> Documents:
        """Returns held-out documents with about `wanted` tokens. Raises UserError for too few."""
        found, size, trains = [], 0, False
        for document in takewhile(lambda one: not one.passes, self.walk()):
            if not self.is_held_out(document):
                trains = True
            elif len(ids := self.tokens(document)):
                found.append(ids[:-1])
                size += len(ids)
            if size > wanted and trains:
                break
        if not found or not trains:
            rule = f"gives too few documents to use a fraction of {self._fraction:g} for validation and the others for training"
            raise UserError(KEY, self.name, rule, "give more and shorter documents, or raise data.validation_fraction")
        ends_D = np.cumsum([len(ids) for ids in found])
        return Documents(np.concatenate(found).astype(np.uint32), np.append(0, ends_D[:-1]), np.diff(ends_D, prepend=0))

    def notes(self) -> list[str]:
        return []

    def digest(self, manifests: Path, progress: ReportProgress) -> str:
        """Returns the hash of data.source and its first LOOKED_AT documents."""
        hashed = hashlib.blake2b(json.dumps(dict(self._section), sort_keys=True).encode(), digest_size=16)
        for document in islice(takewhile(lambda one: not one.passes, self.walk()), LOOKED_AT):
            content = document.content
            hashed.update(content.encode() if isinstance(content, str) else np.asarray(content).tobytes())
        return hashed.hexdigest()

    def documents(self) -> Iterator[tuple[str, str]]:
        """Yields index and text of the first pass's documents."""
        for document in takewhile(lambda one: not one.passes, self.walk()):
            if not isinstance(document.content, str):
                rule = f"is unknown, and {self.name} gives token ids, not text for training a tokenizer"
                raise UserError("data.tokenizer", None, rule, "set data.tokenizer to the tokenizer.json of these ids")
            yield str(document.number), document.content

    def sample(self, limit: int) -> Iterator[tuple[str, str]]:
        read = 0
        for name, text in self.documents():
            yield name, text
            if (read := read + len(text)) >= self.size:
                return
