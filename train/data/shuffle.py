"""Random orders as pure functions of integers, because a library's generator may change.

`permute_N` evaluates a permutation point by point, so sample 10^9 costs the same as sample 0.
"""

import numpy as np

MASK = 2**64 - 1


def _mix(x: int) -> int:
    """The finaliser of splitmix64, a bijection of 64-bit numbers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def key(*numbers: int) -> int:
    """Returns a 64-bit seed for this sequence of integers."""
    state = len(numbers)
    for number in numbers:
        state = _mix((state + 0x9E3779B97F4A7C15 + _mix(number & MASK)) & MASK)
    return state


def noise_N(seed: int, index_N: np.ndarray) -> np.ndarray:
    """Returns 64 random bits (uint64) for each index (uint64)."""
    x_N = index_N * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_N ^ (x_N >> np.uint64(31))


def shuffled_D(seed: int, size: int) -> np.ndarray:
    """Returns 0 to size - 1 (int64) in random order, in O(size)."""
    return np.argsort(noise_N(seed, np.arange(size, dtype=np.uint64)), kind="stable")


def permute_N(seed: int, index_N: np.ndarray, size: int) -> np.ndarray:
    """Returns the images (int64) of index_N under a random permutation of [0, size), in O(1) per index.

    Four Feistel rounds permute a larger range. An image outside [0, size) is permuted again (cycle walking).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    x_N = index_N.astype(np.uint64)
    outside_N = np.ones(len(x_N), dtype=bool)
    while outside_N.any():
        left_N, right_N = x_N[outside_N] >> half, x_N[outside_N] & low
        for turn in range(4):
            left_N, right_N = right_N, left_N ^ (noise_N(key(seed, turn), right_N) & low)
        x_N[outside_N] = (left_N << half) | right_N
        outside_N = x_N >= np.uint64(size)
    return x_N.astype(np.int64)
