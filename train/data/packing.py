"""Packed training sequences, each a pure function of (seed, index) (paper 4.1).

The algorithm. In epoch e, the documents have a random order that depends on (seed, e), and eos ends each document. The
epochs follow one another as one endless stream of tokens. Window w is a training sequence: it covers the tokens w*S to
w*S + S (inclusive) of the stream, where S is seq_len. Neighbouring windows overlap by one token, so every token is the
target of exactly one window. The samples of epoch e are the windows that begin inside epoch e. A second shuffle orders
these windows, so that the parts of a long document are rarely in one batch.

Fill-in-the-middle (FIM; paper 4.1, PSM order) reorders a document: begin, prefix, hole, suffix, end, middle, eos. The
document is cut between tokens, so the FIM document is always three tokens longer. Document g of the stream (counted
from 0) becomes a FIM document if floor((g+1)*rate) > floor(g*rate). Formulas give the start of every epoch and the
position of every sample, so a resumed run does not read earlier data again.

The index of an epoch (order and ends of the documents) takes O(documents) memory. Only the indices of the two newest
epochs are in memory.

D = documents, S1 = seq_len + 1, N = any number of samples.
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
    """uint8 for each token of the file: 1 if the token is supervised (the loss includes its prediction). None: all
    tokens are supervised."""

    def __len__(self) -> int:
        return len(self.starts_D)


@dataclass(frozen=True)
class _Epoch:
    order_D: np.ndarray
    ends_D: np.ndarray
    """End of each document in the order of the epoch, in tokens from the epoch's start."""


class Stream:
    """The endless token stream over some documents, and its windows, which are the training sequences.

    eos: the token after each document. fim: the tokens (begin, hole, end), required if fim_rate > 0.
    """

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
        """Mean number of tokens in an epoch. An epoch may have three tokens more or fewer, because the number of FIM
        documents is an integer."""
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def tokens_before(self, epoch: int) -> int:
        """Returns the number of tokens in the stream before this epoch."""
        return epoch * self.plain_tokens + FIM_TOKENS * self._fim_before(epoch * len(self.documents))

    def samples_before(self, epoch: int) -> int:
        """Returns the number of samples before this epoch: the windows that begin before its first token."""
        return -(-self.tokens_before(epoch) // self.seq_len)

    def windows_N(self, samples_N: np.ndarray) -> np.ndarray:
        """Returns the window index (int64) of each sample. The indices in samples_N must increase."""
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
        """Number of windows (training sequences) that lie entirely in the first epoch."""
        return (self.tokens_before(1) - 1) // self.seq_len

    def fill(
        self, window: int, tokens_S: np.ndarray, numbers_S: np.ndarray | None, supervised_S: np.ndarray | None = None
    ) -> None:
        """Fill the buffers with one window: its tokens, and their document indices, counted from 0 in the window."""
        self.read(window * self.seq_len, tokens_S, numbers_S)

    def read(self, first_token: int, tokens_S: np.ndarray, numbers_S: np.ndarray | None) -> None:
        """Fill tokens_S with the stream's tokens from the position `first_token`. Fill numbers_S with each token's
        document index, counted from 0 in this buffer."""
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
        """Yields documents of the stream, beginning with the one that contains the token at this position.

        Yields token arrays, and the number of tokens to skip, which is 0 for all documents except the first.
        """
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
        """Number of FIM documents among the first `place` documents of the stream. place: an int or an int64 array."""
        return place * self.rate.numerator // self.rate.denominator

    def _epoch(self, number: int) -> _Epoch:
        """Returns the order and the ends of an epoch's documents. They are computed on first use."""
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

        position: index of a token or of a sample. before: maps an epoch to its first index. tokens: tokens per index,
        which is 1 or the length of a sample.
        """
        epoch = int(position * tokens // self.mean_tokens)  # an estimate, which is at most a few epochs off
        while before(epoch) > position:
            epoch -= 1
        while before(epoch + 1) <= position:
            epoch += 1
        return epoch


# PackedChats fills sequences with whole, independent chats, as a pure function of (seed, index).
#
# The algorithm. The seed shuffles the chats, and a stable sort puts the longest chat first. Each chat goes into the
# fullest sequence that has enough free space (best fit, decreasing). A sorted list of the distinct free spaces, at most
# seq_len + 1 of them, finds this sequence. Padding fills the rest of a sequence and has no loss. The same chats share a
# sequence in all epochs; the order of the sequences changes from epoch to epoch.
#
# D = chats, S1 = seq_len + 1 tokens of a sequence, N = any number of samples.


def pack_chats(lengths_D: np.ndarray, room: int, seed: int) -> list[list[int]]:
    """Returns the indices of the chats in each sequence.

    room: number of tokens of a sequence. No chat may be longer, and no chat is split.
    """
    order_D = shuffled_D(key(seed, 0), len(lengths_D))
    order_D = order_D[np.argsort(-lengths_D[order_D], kind="stable")]
    sequences: list[list[int]] = []
    with_space: dict[int, list[int]] = {}
    """Maps an amount of free space to the indices of the sequences with this free space."""
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
    """The endless samples of packed chats. `train.data.dataset` uses them like a `Stream`."""

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
        """Returns the sequence index (int64) of each sample. samples_N: indices of the samples."""
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
        """Fill the buffers with one sequence: its tokens, the index of each token's chat, and the supervised mask.

        Chats are numbered from 0 within the sequence; padding has -1.
        """
        assert numbers_S is not None and supervised_S is not None
        tokens_S[:], numbers_S[:], supervised_S[:] = self._eos, -1, False
        at = 0
        for number, chat in enumerate(self._sequences[window]):
            start, length = int(self._documents.starts_D[chat]), int(self._documents.lengths_D[chat])
            there, here = slice(start, start + length), slice(at, at + length)
            tokens_S[here], numbers_S[here] = self._documents.tokens[there], number
            supervised_S[here] = self._supervised[there] > 0
            at += length
