"""Sequences filled with whole chats, each by itself: a pure function of (seed, index).

The algorithm. Chats, in an order drawn by the seed, are put one after another, the longest first, into the sequence that they fill
best (best fit, decreasing). What is left at the end of a sequence is filled up and never counted. Which chats share a sequence
stays so in all epochs; the order of the sequences is another one in each. Nothing is replayed on resume: the position is the number
of the sample.

Best fit asks for the least free space that is enough: the spaces that there are stand in a sorted list, at most seq_len + 1 of them.

D = chats, S1 = seq_len + 1 tokens of a sequence, N = any number of samples.
"""

from bisect import bisect_left, insort

import numpy as np

from train.data.packing import Documents
from train.data.shuffle import key, permute_N, shuffled_D


def pack_chats(lengths_D: np.ndarray, room: int, seed: int) -> list[list[int]]:
    """Numbers of the chats of every sequence of so many tokens, in which each is whole. No chat is longer than that."""
    order_D = shuffled_D(key(seed, 0), len(lengths_D))
    order_D = order_D[np.argsort(-lengths_D[order_D], kind="stable")]
    sequences: list[list[int]] = []
    with_space: dict[int, list[int]] = {}
    """Numbers of sequences by their free space."""
    spaces: list[int] = []
    """Those that there are, rising."""
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
    """The endless samples of some chats, for `train.data.dataset`."""

    def __init__(self, documents: Documents, seq_len: int, eos: int, seed: int):
        """eos: what fills sequences up."""
        assert documents.supervised is not None and len(documents) > 0
        self._documents, self._supervised, self._eos, self._seed = documents, documents.supervised, eos, seed
        self._sequences = pack_chats(documents.lengths_D, seq_len + 1, seed)

    @property
    def sequences(self) -> float:
        """Samples of an epoch."""
        return float(len(self._sequences))

    @property
    def whole_windows(self) -> int:
        return len(self._sequences)

    def windows_N(self, samples_N: np.ndarray) -> np.ndarray:
        """The sequence (int64) of each sample; samples_N rises."""
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
        """Fill in a sequence: tokens, the number of the chat of each (-1 of what only fills up), and whether it is learnt."""
        assert numbers_S is not None and supervised_S is not None
        tokens_S[:], numbers_S[:], supervised_S[:] = self._eos, -1, False
        at = 0
        for number, chat in enumerate(self._sequences[window]):
            start, length = int(self._documents.starts_D[chat]), int(self._documents.lengths_D[chat])
            there, here = slice(start, start + length), slice(at, at + length)
            tokens_S[here], numbers_S[here] = self._documents.tokens[there], number
            supervised_S[here] = self._supervised[there] > 0
            at += length
