"""Training samples from the user's documents (data.source).

The passes over the source are one endless stream of tokens, with eos after each document. Sample i covers tokens i S to
i S + S (inclusive) of the stream, S = seq_len. Every rank reads the whole stream.

A checkpoint stores a mark: a position in the stream at or before the next sample. A resumed run reads the documents
before the mark again, unless the source has `state_dict` and `load_state_dict`.

S1 = seq_len + 1, B = sequences.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from conf.schema import Config
from train.data.batch import Batch
from train.data.own_documents import OwnDocument, OwnDocuments, StreamMark

MARKS = 16
"""Number of newest marks (positions in the stream) in memory. More than the batches that are built in advance."""


class StreamedData:
    """Training samples of data.source. This class has the methods of `TrainingData`."""

    def __init__(self, documents: OwnDocuments, config: Config):
        self.seq_len, self._mask, self._documents = config.seq_len, config.data.mask_documents, documents
        self._start = StreamMark()
        self._walk: Iterator[tuple[StreamMark, np.ndarray, np.ndarray]] | None = None
        self._next = 0
        self._pass_samples = 0
        self._marks: deque[StreamMark] = deque(maxlen=MARKS)

    def go_on(self, mark: dict[str, Any] | None) -> None:
        """Resume at a checkpoint's `mark`; None: start at the beginning."""
        self._start = StreamMark(**mark or {})
        self._pass_samples = self._start.pass_samples

    def mark(self, samples: int) -> dict[str, Any]:
        """Returns the latest known mark at or before this sample."""
        known = [mark for mark in (self._start, *self._marks) if mark.sample <= samples]
        return asdict(replace(known[-1], pass_samples=self._pass_samples))

    def batch(self, first_sample: int, count: int) -> Batch:
        """Returns the samples first_sample to first_sample + count - 1, as tokens (count, seq_len + 1).

        A smaller first_sample than before restarts the stream at a mark.
        """
        if self._walk is None or first_sample < self._next:
            start = self._start if self._start.sample <= first_sample else StreamMark()
            self._walk, self._next = self._samples(start), start.sample
        taken = list(islice(self._walk, first_sample - self._next, first_sample - self._next + count))
        self._next = first_sample + count
        self._marks.append(taken[0][0])
        tokens_BS, numbers_BS = (torch.from_numpy(np.stack(rows)) for rows in list(zip(*taken, strict=True))[1:])
        return Batch(tokens_BS, numbers_BS.int() if self._mask else None)

    def _samples(self, mark: StreamMark) -> Iterator[tuple[StreamMark, np.ndarray, np.ndarray]]:
        """Yields each sample from `mark` on: its mark, tokens (S1,), and document indices (S1,)."""
        length, sample, skip = self.seq_len, mark.sample, mark.skip
        tokens = np.empty(0, np.int64)
        held: deque[tuple[OwnDocument, int, int]] = (
            deque()
        )  # (document, number of its used tokens, number of its tokens in the buffer)
        for document in self._documents.walk(mark):
            if document.passes and not self._pass_samples:
                self._pass_samples = sample
            ids = np.empty(0) if self._documents.is_held_out(document) else self._documents.tokens(document)[skip:]
            if not len(ids):
                continue
            held.append((document, skip, len(ids)))
            tokens, skip = np.concatenate([tokens, ids]), 0
            while len(tokens) > length:
                at, after, _ = held[0]
                numbers = np.repeat(np.arange(len(held)), [here for _, _, here in held])
                begins = StreamMark(sample, at.passes, at.number, after, state=at.state)
                yield begins, tokens[: length + 1], numbers[: length + 1]
                tokens, sample, left = tokens[length:], sample + 1, length
                while left >= held[0][2]:
                    left -= held.popleft()[2]
                at, after, here = held[0]
                held[0] = at, after + left, here - left

    def epochs(self, samples: int) -> dict[str, float]:
        """Maps the source's name to the number of passes over the source (not an integer); 0 during the first pass."""
        return {self._documents.name: samples / self._pass_samples if self._pass_samples else 0.0}

    def repeats(self, samples: int) -> str | None:
        """Returns None, because the length of the source is unknown."""
        return None

    def read_once(self, before: int, after: int) -> list[str]:
        """Returns the source's name if the first pass ended between these samples."""
        return [self._documents.name] if self._pass_samples and before <= self._pass_samples < after else []
