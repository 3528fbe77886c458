"""The training samples that documents of the user's own make (data.source).

The documents of a pass are taken in their order, each ended by eos, and pass follows pass: one endless stream of tokens. Sample i covers
tokens [i S, i S + S] of it, S = seq_len. Every rank walks over the whole stream and keeps its own samples, so that a sample is the
same in every layout.

The position is a number of samples, as with any data. A checkpoint also holds a mark near it: which document of which pass, and how
many of its tokens were read. So a run that goes on asks for the documents before it once more and looks into none of them; where the
source has `state_dict` and `load_state_dict`, they are not even made.

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
"""Marks that are remembered, of the last batches: more than are made ahead."""


class StreamedData:
    """Training samples of data.source; the place of `TrainingData`."""

    def __init__(self, documents: OwnDocuments, config: Config):
        self.seq_len, self._mask, self._documents = config.seq_len, config.data.mask_documents, documents
        self._start = StreamMark()
        self._walk: Iterator[tuple[StreamMark, np.ndarray, np.ndarray]] | None = None
        self._next = 0
        self._pass_samples = 0
        self._marks: deque[StreamMark] = deque(maxlen=MARKS)

    def go_on(self, mark: dict[str, Any] | None) -> None:
        """Begin at what `mark` gave when a checkpoint was written; None for one that has none."""
        self._start = StreamMark(**mark or {})
        self._pass_samples = self._start.pass_samples

    def mark(self, samples: int) -> dict[str, Any]:
        """The last known mark at or before this sample."""
        known = [mark for mark in (self._start, *self._marks) if mark.sample <= samples]
        return asdict(replace(known[-1], pass_samples=self._pass_samples))

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples first_sample .. first_sample + count - 1, as tokens (count, seq_len + 1). Faster forwards than back."""
        if self._walk is None or first_sample < self._next:
            start = self._start if self._start.sample <= first_sample else StreamMark()
            self._walk, self._next = self._samples(start), start.sample
        taken = list(islice(self._walk, first_sample - self._next, first_sample - self._next + count))
        self._next = first_sample + count
        self._marks.append(taken[0][0])
        tokens_BS, numbers_BS = (torch.from_numpy(np.stack(rows)) for rows in list(zip(*taken, strict=True))[1:])
        return Batch(tokens_BS, numbers_BS.int() if self._mask else None)

    def _samples(self, mark: StreamMark) -> Iterator[tuple[StreamMark, np.ndarray, np.ndarray]]:
        """From a mark on: the mark of each sample, its tokens (S1,) and the numbers of its documents (S1,)."""
        length, sample, skip = self.seq_len, mark.sample, mark.skip
        tokens = np.empty(0, np.int64)
        held: deque[tuple[OwnDocument, int, int]] = deque()  # whose tokens these are: how many are behind, and are here
        for document in self._documents.walk(mark):
            if document.passes and not self._pass_samples:
                self._pass_samples = sample
            ids = np.empty(0) if self._documents.is_held_out(document) else self._documents.tokens(document)[skip:]
            if not len(ids):
                continue
            held.append((document, skip, len(ids)))
            tokens, skip = np.concatenate([tokens, ids]), 0
            while len(tokens) > length:
                at, behind, _ = held[0]
                numbers = np.repeat(np.arange(len(held)), [here for _, _, here in held])
                begins = StreamMark(sample, at.passes, at.number, behind, state=at.state)
                yield begins, tokens[: length + 1], numbers[: length + 1]
                tokens, sample, left = tokens[length:], sample + 1, length
                while left >= held[0][2]:
                    left -= held.popleft()[2]
                at, behind, here = held[0]
                held[0] = at, behind + left, here - left

    def epochs(self, samples: int) -> dict[str, float]:
        """Passes by these samples; 0 until the first one has ended."""
        return {self._documents.name: samples / self._pass_samples if self._pass_samples else 0.0}

    def repeats(self, samples: int) -> str | None:
        """Nobody knows how many documents there are."""
        return None

    def read_once(self, before: int, after: int) -> list[str]:
        """The source, if the first pass ended between these samples."""
        return [self._documents.name] if self._pass_samples and before <= self._pass_samples < after else []
