"""Packed training sequences, each a pure function of (seed, index) (paper 4.1).

- Each epoch has a random order of the documents, and eos ends each document. The epochs are one endless stream of
  tokens.
- Window w is a training sequence: the tokens w*seq_len to (w + 1)*seq_len (inclusive) of the stream. Every token is the
  target of exactly one window.
- The samples of epoch e are the windows that begin in it, in a second random order.

Fill-in-the-middle (FIM; paper 4.1, PSM order) reorders a document: begin, prefix, hole, suffix, end, middle, eos. It
adds three tokens. Document g of the stream becomes a FIM document if floor((g+1)*rate) > floor(g*rate). So formulas
give the position of every sample, and a resumed run does not read earlier data again.

The document orders of the two newest epochs are in memory.

D = documents, S = seq_len + 1, N = any number of samples.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from train.data.shuffle import key, permute_N, shuffled_D

FIM_TOKENS = 3


@dataclass(frozen=True)
class Documents:
    """A selection of documents in a token file."""

    tokens: np.ndarray
    """The tokens of the whole file (uint16 or uint32), usually memory-mapped."""
    starts_D: np.ndarray
    """Position of the first token of each document (int64)."""
    lengths_D: np.ndarray
    """Number of tokens of each document, without eos (int64)."""
    supervised: np.ndarray | None = None
    """uint8 for each token: whether the loss includes its prediction. None: all."""

    def __len__(self) -> int:
        return len(self.starts_D)


@dataclass(frozen=True)
class _Epoch:
    order_D: np.ndarray
    ends_D: np.ndarray
    """Number of tokens up to the end of each document, in the epoch's order."""


class Stream:
    """The endless token stream over some documents. fim: tokens (begin, hole, end)."""

    def __init__(
        self,
        documents: Documents,
        seq_len: int,
        eos: int,
        seed: int,
        fim: tuple[int, int, int] | None = None,
        fim_rate: float = 0.0,
    ):
        assert len(documents) > 0 and (fim is not None or fim_rate == 0)
        self.documents, self.seq_len, self.seed = documents, seq_len, seed
        self.rate = Fraction(fim_rate).limit_denominator(10**6)
        dtype = documents.tokens.dtype
        self.eos = np.array([eos], dtype)
        self.fim = [np.array([token], dtype) for token in fim or ()]
        self.plain_tokens = int(documents.lengths_D.sum()) + len(documents)
        self.mean_tokens = self.plain_tokens + FIM_TOKENS * len(documents) * self.rate
        """Mean number of tokens in an epoch. A single epoch may have three tokens more or fewer."""
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def tokens_before(self, epoch: int) -> int:
        """Returns the number of tokens in the stream before this epoch."""
        return epoch * self.plain_tokens + FIM_TOKENS * self._fim_before(epoch * len(self.documents))

    def samples_before(self, epoch: int) -> int:
        """Returns the number of samples before this epoch."""
        return -(-self.tokens_before(epoch) // self.seq_len)

    def windows_N(self, samples_N: np.ndarray) -> np.ndarray:
        """Returns each sample's window index (int64). samples_N must increase."""
        windows_N = np.empty(len(samples_N), dtype=np.int64)
        done = 0
        while done < len(samples_N):
            epoch = self._epoch_of(int(samples_N[done]), self.samples_before, self.seq_len)
            first, stop = self.samples_before(epoch), self.samples_before(epoch + 1)
            upto = int(np.searchsorted(samples_N, stop))
            inside_N = permute_N(key(self.seed, epoch, 1), samples_N[done:upto] - first, stop - first)
            windows_N[done:upto] = first + inside_N
            done = upto
        return windows_N

    @property
    def sequences(self) -> float:
        """Mean number of samples in an epoch."""
        return float(self.mean_tokens / self.seq_len)

    @property
    def whole_windows(self) -> int:
        """Number of windows that lie entirely in the first epoch."""
        return (self.tokens_before(1) - 1) // self.seq_len

    def fill(
        self, window: int, tokens_S: np.ndarray, numbers_S: np.ndarray | None, supervised_S: np.ndarray | None = None
    ) -> None:
        """Fill the buffers with one window: its tokens and document indices."""
        self.read(window * self.seq_len, tokens_S, numbers_S)

    def read(self, first_token: int, tokens_S: np.ndarray, numbers_S: np.ndarray | None) -> None:
        """Fill the buffers with the stream's tokens from `first_token` on, and document indices."""
        number, filled = 0, 0
        for pieces, skip in self._documents_from(first_token):
            begin = filled
            for piece in pieces:
                if skip >= len(piece):
                    skip -= len(piece)
                    continue
                part = piece[skip : skip + len(tokens_S) - filled]
                tokens_S[filled : filled + len(part)] = part
                filled += len(part)
                skip = 0
            if numbers_S is not None:
                numbers_S[begin:filled] = number
            number += 1
            if filled == len(tokens_S):
                return

    def _documents_from(self, token: int) -> Iterator[tuple[list[np.ndarray], int]]:
        """Yields (token arrays, number of tokens to skip) of each document, from the document with `token` on."""
        number = self._epoch_of(token, self.tokens_before, 1)
        local = token - self.tokens_before(number)
        epoch = self._epoch(number)
        slot = int(np.searchsorted(epoch.ends_D, local, side="right"))
        skip = local - (int(epoch.ends_D[slot - 1]) if slot else 0)
        while True:
            yield self._pieces(number, slot, int(epoch.order_D[slot])), skip
            slot, skip = slot + 1, 0
            if slot == len(self.documents):
                number, slot = number + 1, 0
                epoch = self._epoch(number)

    def _pieces(self, epoch: int, slot: int, document: int) -> list[np.ndarray]:
        start, length = int(self.documents.starts_D[document]), int(self.documents.lengths_D[document])
        text = self.documents.tokens[start : start + length]
        place = epoch * len(self.documents) + slot
        if self._fim_before(place + 1) == self._fim_before(place):
            return [text, self.eos]
        cuts = (key(self.seed, epoch, 2, document, turn) % (length + 1) for turn in range(2))
        low, high = sorted(cuts)
        begin, hole, end = self.fim
        return [begin, text[:low], hole, text[high:], end, text[low:high], self.eos]

    def _fim_before(self, place):
        """Returns the number of FIM documents among the first `place` documents. place: int or int64 array."""
        return place * self.rate.numerator // self.rate.denominator

    def _epoch(self, number: int) -> _Epoch:
        """Returns an epoch's document order and ends, computed on first use."""
        if number not in self._epochs:
            size = len(self.documents)
            order_D = shuffled_D(key(self.seed, number, 0), size)
            sizes_D = self.documents.lengths_D[order_D] + 1
            if self.rate:
                places_D1 = np.arange(number * size, (number + 1) * size + 1, dtype=np.int64)
                sizes_D += FIM_TOKENS * np.diff(self._fim_before(places_D1))
            self._epochs[number] = _Epoch(order_D, np.cumsum(sizes_D))
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[number]

    def _epoch_of(self, position: int, before: Callable[[int], int], tokens: int) -> int:
        """Returns the epoch e with before(e) <= position < before(e + 1).

        before: returns an epoch's first position. tokens: number of tokens in the stream for one position.
        """
        epoch = int(position * tokens // self.mean_tokens)  # an estimate, which is at most a few epochs off
        while before(epoch) > position:
            epoch -= 1
        while before(epoch + 1) <= position:
            epoch += 1
        return epoch


# PackedChats fills sequences with whole, independent chats, as a pure function of (seed, index).
#
# The seed shuffles the chats, and a stable sort puts the longest chat first. Each chat goes into the fullest sequence
# that has enough free space (best fit, decreasing). Padding fills the rest of a sequence. Only the order of the
# sequences changes from epoch to epoch.
#
# D = chats, S = seq_len + 1, N = any number of samples.


def pack_chats(lengths_D: np.ndarray, room: int, seed: int) -> list[list[int]]:
    """Returns the indices of the chats in each sequence of `room` tokens."""
    order_D = shuffled_D(key(seed, 0), len(lengths_D))
    order_D = order_D[np.argsort(-lengths_D[order_D], kind="stable")]
    sequences: list[list[int]] = []
    with_space: dict[int, list[int]] = {}
    """Maps free space to the indices of sequences with this space."""
    spaces: list[int] = []
    """The keys of `with_space`, sorted."""
    for chat, length in zip(order_D.tolist(), lengths_D[order_D].tolist(), strict=True):
        place = bisect_left(spaces, length)
        if place < len(spaces):
            space = spaces[place]
            number = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[place]
        else:
            space, number = room, len(sequences)
            sequences.append([])
        sequences[number].append(chat)
        if left := space - length:
            if left not in with_space:
                insort(spaces, left)
            with_space.setdefault(left, []).append(number)
    return sequences


class PackedChats:
    """The endless samples of packed chats, with the methods of `Stream`."""

    def __init__(self, documents: Documents, seq_len: int, eos: int, seed: int):
        """eos: the end-of-document token, which is also used as padding."""
        assert documents.supervised is not None and len(documents) > 0
        self._documents, self._supervised, self._eos, self._seed = documents, documents.supervised, eos, seed
        self._sequences = pack_chats(documents.lengths_D, seq_len + 1, seed)

    @property
    def sequences(self) -> float:
        """Number of samples in an epoch."""
        return float(len(self._sequences))

    @property
    def whole_windows(self) -> int:
        return len(self._sequences)

    def windows_N(self, samples_N: np.ndarray) -> np.ndarray:
        """Returns the sequence index (int64) of each sample."""
        count = len(self._sequences)
        epochs_N, inside_N = np.divmod(samples_N.astype(np.int64), count)
        found_N = np.empty(len(samples_N), dtype=np.int64)
        for epoch in np.unique(epochs_N):
            here_N = epochs_N == epoch
            found_N[here_N] = permute_N(key(self._seed, int(epoch), 1), inside_N[here_N], count)
        return found_N

    def fill(
        self, window: int, tokens_S: np.ndarray, numbers_S: np.ndarray | None, supervised_S: np.ndarray | None
    ) -> None:
        """Fill the buffers with one sequence: tokens, chat indices (-1: padding), supervised mask."""
        assert numbers_S is not None and supervised_S is not None
        tokens_S[:], numbers_S[:], supervised_S[:] = self._eos, -1, False
        at = 0
        for number, chat in enumerate(self._sequences[window]):
            start, length = int(self._documents.starts_D[chat]), int(self._documents.lengths_D[chat])
            there, here = slice(start, start + length), slice(at, at + length)
            tokens_S[here], numbers_S[here] = self._documents.tokens[there], number
            supervised_S[here] = self._supervised[there] > 0
            at += length
