"""The three limits of a kernel from timings of it: seconds = calls a + operations / flops + bytes / bandwidth.

Least squares of the relative errors under the condition that no limit is negative. With three unknowns the best of the
seven subsets of them that may be non-zero is found by trying all.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from conf.schema import Rate


def fit_rate(samples: Sequence[tuple[float, float, float]]) -> tuple[Rate, float]:
    """The rate of samples (operations, bytes, seconds) of one call each, and the largest relative error of the fit."""
    rows_N3 = np.array([[1.0, flops, moved] for flops, moved, _ in samples])
    seconds_N = np.array([seconds for *_, seconds in samples])
    relative_N3 = rows_N3 / seconds_N[:, None]
    best, least = np.zeros(3), np.inf
    usable = [column for column in range(3) if relative_N3[:, column].any()]
    for size in range(1, len(usable) + 1):
        for columns in combinations(usable, size):
            scale = relative_N3[:, columns].max(0)  # operations are 1e9 times a call: keep the matrix well conditioned
            part, *_ = np.linalg.lstsq(relative_N3[:, columns] / scale, np.ones(len(samples)), rcond=None)
            error = np.square(relative_N3[:, columns] / scale @ part - 1).sum()
            if (part >= 0).all() and error < least * (1 - 1e-9):
                best, least = np.zeros(3), error
                best[list(columns)] = part / scale
    worst = float(np.abs(relative_N3 @ best - 1).max())
    call, per_flop, per_byte = best.tolist()
    return Rate(call, 1 / per_flop if per_flop else 0.0, 1 / per_byte if per_byte else 0.0), worst
