"""Which source of a mix each sample comes from: shares follow the weights exactly, with no state.

Source 0 takes its share of all samples: after n samples it has had floor(n * w0 / (w0 + w1 + ...)). The samples that it
leaves are numbered again and source 1 takes its share of them, and so on. Every count is a closed form in n, never falls
and stays within a few samples of its share (one per source before it). The weights are taken as fractions with a
denominator of at most 10^6.

N = samples.
"""

from fractions import Fraction

import numpy as np


class Schedule:
    """The split of samples 0, 1, 2, ... among sources with these weights (all positive)."""

    def __init__(self, weights: list[float]):
        exact = [Fraction(weight) for weight in weights]
        self.shares = [(exact[s] / sum(exact[s:])).limit_denominator(10**6) for s in range(len(exact))]

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` samples come from each source."""
        counts = []
        for share in self.shares:
            counts.append(samples * share.numerator // share.denominator)
            samples -= counts[-1]
        return counts

    def assign(self, first: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each source: rows (int64, 0..count-1) of samples [first, first+count) that are its own, and which of its
        own samples they are."""
        rows_N, place_N = np.arange(count), np.arange(first, first + count, dtype=np.int64)
        taken = []
        for share in self.shares:
            before_N = place_N * share.numerator // share.denominator
            mine_N = (place_N + 1) * share.numerator // share.denominator > before_N
            taken.append((rows_N[mine_N], before_N[mine_N]))
            rows_N, place_N = rows_N[~mine_N], (place_N - before_N)[~mine_N]
        return taken
