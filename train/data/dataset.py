"""Batches for training and validation, by number.

S1 = seq_len + 1, B = sequences.
"""

import numpy as np
import torch

from conf.schema import Config
from train.data.batch import Batch
from train.data.corpus import Corpus
from train.data.mix import Schedule
from train.data.packing import Stream
from train.data.shuffle import key


class TrainingData:
    """Endless training samples. Sample i is a function of the data, seq_len, the seed and i alone."""

    def __init__(self, corpus: Corpus, config: Config):
        self.seq_len, self.mask = config.seq_len, config.data.mask_documents
        self._names = [part.name for part in corpus.parts]
        self._schedule = Schedule([part.weight for part in corpus.parts])
        self._streams = [
            Stream(
                part.train,
                config.seq_len,
                corpus.tokenizer.eos_id,
                key(config.seed, number),
                corpus.tokenizer.fim_ids,
                config.data.fim_rate,
            )
            for number, part in enumerate(corpus.parts)
        ]

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples first_sample .. first_sample + count - 1, as tokens (count, seq_len + 1)."""
        tokens_BS, numbers_BS = _empty(count, self.seq_len, self.mask)
        for stream, (rows_B, samples_B) in zip(self._streams, self._schedule.assign(first_sample, count), strict=True):
            for row, window in zip(rows_B.tolist(), stream.windows_N(samples_B).tolist(), strict=True):
                stream.read(window * self.seq_len, tokens_BS[row], None if numbers_BS is None else numbers_BS[row])
        return _batch(tokens_BS, numbers_BS)

    def epochs(self, samples: int) -> dict[str, float]:
        """How often the training text of each source has been read after this many samples."""
        counts = self._schedule.counts(samples)
        return {
            name: float(count * self.seq_len / stream.mean_tokens)
            for name, count, stream in zip(self._names, counts, self._streams, strict=True)
        }

    def repeats(self, samples: int) -> str | None:
        """A warning where so many samples read a source more than once; None where they do not."""
        often = [f"{name} {times:.3g} times" for name, times in self.epochs(samples).items() if times > 1]
        if not often:
            return None
        return (
            f"the run reads its training text more than once ({', '.join(often)}): repeated text teaches less than new text, and "
            "the held-out loss tells when it no longer helps"
        )

    def read_once(self, before: int, after: int) -> list[str]:
        """Sources of which the sample number `after` begins a second reading that the sample `before` had not begun."""
        then = self.epochs(before)
        return [name for name, times in self.epochs(after).items() if then[name] <= 1 < times]


class ValidationData:
    """Fixed sequences of held-out documents, spread evenly over them: the same for every seed, without FIM.

    Bits per byte: the nats of all targets / ln 2 / text_bytes of the same sequences. The bytes are those of the text that
    the targets decode to, exactly. eos is a target like any other and costs nats, for the model has to say where a
    document ends, but stands for no text: 0 bytes.
    """

    def __init__(self, corpus: Corpus, config: Config, sequences: int | None = None):
        """sequences: how many, shared among the sources by weight; None takes log.validation_sequences."""
        self.seq_len, self.mask = config.seq_len, config.data.mask_documents
        self.notes: list[str] = []
        self._tokenizer = corpus.tokenizer
        sequences = config.log.validation_sequences if sequences is None else sequences
        wanted = Schedule([part.weight for part in corpus.parts]).counts(sequences)
        self._places: list[tuple[Stream, int]] = []
        for part, count in zip(corpus.parts, wanted, strict=True):
            stream = Stream(part.validation, config.seq_len, corpus.tokenizer.eos_id, seed=0)
            whole = (stream.tokens_before(1) - 1) // config.seq_len
            if count > 0 and whole == 0:
                self.notes.append(
                    f"the held-out text has only {stream.tokens_before(1)} tokens: validation reads it more than once"
                )
            count = min(count, max(1, whole))
            self._places += [(stream, max(1, whole) * place // count * config.seq_len) for place in range(count)]

    def __len__(self) -> int:
        """Sequences: those wanted, or as many as there are."""
        return len(self._places)

    def batch(self, first: int, count: int) -> Batch:
        """Sequences first .. first + count - 1, fewer at the end, as tokens (count, seq_len + 1)."""
        places = self._places[first : first + count]
        tokens_BS, numbers_BS = _empty(len(places), self.seq_len, self.mask)
        for row, (stream, place) in enumerate(places):
            stream.read(place, tokens_BS[row], None if numbers_BS is None else numbers_BS[row])
        return _batch(tokens_BS, numbers_BS)

    def text_bytes(self, batch: Batch) -> int:
        """Bytes of text that the targets of this batch decode to."""
        return int(self._tokenizer.bytes_V[batch.tokens_BS[:, 1:].numpy()].sum())


def _empty(count: int, seq_len: int, mask: bool) -> tuple[np.ndarray, np.ndarray | None]:
    shape = (count, seq_len + 1)
    return np.empty(shape, np.int64), np.empty(shape, np.int32) if mask else None


def _batch(tokens_BS: np.ndarray, numbers_BS: np.ndarray | None) -> Batch:
    return Batch(torch.from_numpy(tokens_BS), None if numbers_BS is None else torch.from_numpy(numbers_BS))
