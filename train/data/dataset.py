"""Batches for training and validation. A batch is selected by the index of its first sample.

S = seq_len + 1, B = sequences.
"""

from fractions import Fraction

import numpy as np
import torch

from conf.schema import Config
from train.data.batch import Batch
from train.data.corpus import Corpus
from train.data.packing import Documents, PackedChats, Stream
from train.data.shuffle import key
from train.data.tokenizer import Tokenizer

# A schedule decides which source of a mix each sample comes from. It has no state.
#
# Of the first n samples, source 0 takes floor(n * w0 / (w0 + w1 + ...)). The other samples are numbered again from 0,
# source 1 takes its share of them, and so on. Each count differs from the exact share by at most one sample for each
# earlier source.
#
# N = samples.


class Schedule:
    """Splits samples 0, 1, 2, ... among sources with positive weights."""

    def __init__(self, weights: list[float]):
        exact = [Fraction(weight) for weight in weights]
        self.shares = [(exact[s] / sum(exact[s:])).limit_denominator(10**6) for s in range(len(exact))]

    def counts(self, samples: int) -> list[int]:
        """Returns how many of the first `samples` samples each source gives."""
        counts = []
        for share in self.shares:
            counts.append(samples * share.numerator // share.denominator)
            samples -= counts[-1]
        return counts

    def assign(self, first: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Splits `count` samples from index `first` on. Returns batch rows and sample indices of each source."""
        rows_N, place_N = np.arange(count), np.arange(first, first + count, dtype=np.int64)
        taken = []
        for share in self.shares:
            before_N = place_N * share.numerator // share.denominator
            mine_N = (place_N + 1) * share.numerator // share.denominator > before_N
            taken.append((rows_N[mine_N], before_N[mine_N]))
            rows_N, place_N = rows_N[~mine_N], (place_N - before_N)[~mine_N]
        return taken


class TrainingData:
    """Endless training samples, pure functions of data, seq_len, seed and index."""

    def __init__(self, corpus: Corpus, config: Config):
        self.seq_len, self.mask, self.chats = config.seq_len, config.data.mask_documents, config.data.chats
        self._names = [part.name for part in corpus.parts]
        self._schedule = Schedule([part.weight for part in corpus.parts])
        self._streams = [
            _stream(part.train, config, corpus.tokenizer, key(config.seed, number), config.data.fim_rate)
            for number, part in enumerate(corpus.parts)
        ]

    @property
    def sequences(self) -> float:
        """Mean number of samples in one epoch over all sources."""
        return sum(stream.sequences for stream in self._streams)

    def batch(self, first_sample: int, count: int) -> Batch:
        """Returns `count` samples from index first_sample on, as tokens (count, seq_len + 1)."""
        rows = _Rows(count, self.seq_len, self.mask, self.chats)
        for stream, (rows_B, samples_B) in zip(self._streams, self._schedule.assign(first_sample, count), strict=True):
            for row, window in zip(rows_B.tolist(), stream.windows_N(samples_B).tolist(), strict=True):
                stream.fill(window, *rows.of(row))
        return rows.batch

    def epochs(self, samples: int) -> dict[str, float]:
        """Maps each source to its number of epochs in these samples."""
        counts = self._schedule.counts(samples)
        return {
            name: float(count / stream.sequences)
            for name, count, stream in zip(self._names, counts, self._streams, strict=True)
        }

    def repeats(self, samples: int) -> str | None:
        """Returns a warning if a source is read more than once."""
        often = [f"{name} {times:.3g} times" for name, times in self.epochs(samples).items() if times > 1]
        if not often:
            return None
        return f"the run reads its training text more than once ({', '.join(often)}): repeated text is less useful than new text; stop when the held-out loss no longer falls"

    def read_once(self, before: int, after: int) -> list[str]:
        """Returns the sources whose second epoch begins between the samples `before` and `after`."""
        then = self.epochs(before)
        return [name for name, times in self.epochs(after).items() if then[name] <= 1 < times]


class ValidationData:
    """Fixed sequences, spread evenly over the held-out documents. They are the same for every seed.

    Bits per byte = loss of all targets in nats / ln 2 / text_bytes. eos has 0 bytes.
    """

    def __init__(self, corpus: Corpus, config: Config, sequences: int | None = None):
        """sequences: number of sequences; None: log.validation_sequences."""
        self.seq_len, self.mask, self.chats = config.seq_len, config.data.mask_documents, config.data.chats
        self.notes: list[str] = []
        self._tokenizer = corpus.tokenizer
        sequences = config.log.validation_sequences if sequences is None else sequences
        wanted = Schedule([part.weight for part in corpus.parts]).counts(sequences)
        self._places: list[tuple[Stream | PackedChats, int]] = []
        for part, count in zip(corpus.parts, wanted, strict=True):
            stream = _stream(part.validation, config, corpus.tokenizer, seed=0)
            whole = stream.whole_windows
            if count > 0 and whole == 0 and isinstance(stream, Stream):
                self.notes.append(
                    f"the held-out text has only {stream.tokens_before(1)} tokens: validation reads it more than once"
                )
            count = min(count, max(1, whole))
            self._places += [(stream, max(1, whole) * place // count) for place in range(count)]

    def __len__(self) -> int:
        """Returns the number of sequences, which is smaller than requested if the held-out text is short."""
        return len(self._places)

    def batch(self, first: int, count: int) -> Batch:
        """Returns up to `count` sequences from `first` on, as tokens (count, seq_len + 1)."""
        places = self._places[first : first + count]
        rows = _Rows(len(places), self.seq_len, self.mask, self.chats)
        for row, (stream, window) in enumerate(places):
            stream.fill(window, *rows.of(row))
        return rows.batch

    def text_bytes(self, batch: Batch) -> int:
        """Returns the number of bytes of text in this batch's targets. For chats, only learnt targets count."""
        bytes_BT = self._tokenizer.bytes_V[batch.tokens_BS[:, 1:].numpy()]
        learnt_BT = batch.learnt_BT
        return int(bytes_BT.sum() if learnt_BT is None else bytes_BT[learnt_BT.numpy()].sum())


def _stream(
    documents: Documents, config: Config, tokenizer: Tokenizer, seed: int, fim_rate: float = 0.0
) -> Stream | PackedChats:
    """Returns a reader of training sequences: continuous text, or packed chats."""
    if config.data.chats:
        return PackedChats(documents, config.seq_len, tokenizer.eos_id, seed)
    return Stream(documents, config.seq_len, tokenizer.eos_id, seed, tokenizer.fim_ids, fim_rate)


class _Rows:
    """Buffers of a batch that is being filled."""

    def __init__(self, count: int, seq_len: int, mask: bool, chats: bool):
        shape = (count, seq_len + 1)
        self._tokens_BS = np.empty(shape, np.int64)
        self._numbers_BS = np.empty(shape, np.int32) if mask or chats else None
        self._supervised_BS = np.empty(shape, np.bool_) if chats else None

    def of(self, row: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Returns a row's buffers to fill: tokens, document indices, supervised mask."""
        numbers_S = None if self._numbers_BS is None else self._numbers_BS[row]
        return self._tokens_BS[row], numbers_S, None if self._supervised_BS is None else self._supervised_BS[row]

    @property
    def batch(self) -> Batch:
        numbers_BS, supervised_BS = (
            None if part is None else torch.from_numpy(part) for part in (self._numbers_BS, self._supervised_BS)
        )
        return Batch(torch.from_numpy(self._tokens_BS), numbers_BS, supervised_BS)
