"""Finds ranks that are slower than other ranks with the same work, even if step times are noisy.

After every step, a rank reports the time of its own work. Its peers are the ranks of the same pipeline stage. The
window is the last WINDOW_BLOCKS x BLOCK_STEPS steps, in blocks of BLOCK_STEPS steps. A rank's value of a block is
log(its median time / the median of its peers' median times). A rank is slow if all of these conditions hold:

    - The mean of its values over the blocks is at least log(`factor`).
    - This mean is at least NOISE times the noise of one block (that is, NOISE x sqrt(WINDOW_BLOCKS) standard
      errors of the mean).
    - Its value in every block is at least half of the mean, so that the slowness lasts.

The noise of a block is the larger of two values:

    - the standard error of the block's median, from the spread of single steps inside the blocks
    - the spread between the blocks of the peers

A slow rank is named once. It is named again only after a complete window in which it was as fast as its peers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK_STEPS, WINDOW_BLOCKS = 10, 8
"""Number of steps in a block, and of blocks in the window."""
NOISE = 2.0
SPREAD = 1.4826
"""Ratio of standard deviation to median absolute deviation, for normal noise."""
MEDIAN_ERROR = 1.2533
"""Ratio of the standard errors of a median and of a mean, for normal noise."""
LEAST_SECONDS = 0.01
"""Minimum seconds per step by which a slow rank exceeds its peers."""
COUNTED_SECONDS = 1e-9
"""Lower bound of a step's seconds, for a finite logarithm."""
LONE_FACTOR = 2.0
"""Minimum slowdown factor of a rank that is alone in its stage. Its peers then have stages whose work may differ."""


@dataclass(frozen=True)
class SlowRank:
    """A rank that computes longer than its peers. seconds: median per step of this rank. median: median per step of its
    peers.
    """

    rank: int
    seconds: float
    median: float


class Stragglers:
    """Collects the step times of ranks and names the slow ranks."""

    def __init__(self, stages: Sequence[Sequence[int]]):
        """Create an empty collection. stages: ranks of each stage."""
        everyone = [rank for ranks in stages for rank in ranks]
        self._groups = [np.array(ranks) for ranks in stages if len(ranks) > 1]
        self._lone = np.array([ranks[0] for ranks in stages if len(ranks) == 1], int)
        self._everyone = np.array(everyone) if len(self._lone) and len(everyone) > 1 else None
        self._steps_RW = np.ones((len(everyone), BLOCK_STEPS * WINDOW_BLOCKS))
        """Seconds of each rank's newest steps; column: step modulo window length."""
        self._seen_R = np.zeros(len(everyone), int)
        self._filled = 0
        """Number of filled blocks, summed over all ranks."""
        self._judged = 0
        """Number of blocks that all ranks had filled when last checked."""
        self._named: set[int] = set()

    def take(self, rank: int, busy: float) -> None:
        """Record the seconds of a rank's own work in a step."""
        seen = self._seen_R[rank]
        self._steps_RW[rank, seen % (BLOCK_STEPS * WINDOW_BLOCKS)] = max(busy, COUNTED_SECONDS)
        self._seen_R[rank] = seen + 1
        self._filled += (seen + 1) % BLOCK_STEPS == 0

    def new(self, factor: float) -> list[SlowRank]:
        """Return newly slow ranks. The check waits until all ranks have filled another block."""
        if not factor or self._filled < len(self._seen_R) * max(WINDOW_BLOCKS, self._judged + 1):
            return []
        blocks = int(self._seen_R.min()) // BLOCK_STEPS
        if blocks < WINDOW_BLOCKS or blocks == self._judged:
            return []
        self._judged = blocks
        found = [slow for ranks in self._groups for slow in self._judge(ranks, factor, ranks)]
        if self._everyone is not None:
            found += self._judge(self._everyone, max(factor, LONE_FACTOR), self._lone)
        return sorted(found, key=lambda slow: slow.rank)

    def _judge(self, ranks: np.ndarray, factor: float, wanted: np.ndarray) -> list[SlowRank]:
        """Return the newly slow ranks of `wanted`, compared with the others of `ranks`.

        Shapes: R ranks, B blocks, S steps of a block, W steps of the window.
        """
        order_RW = (self._seen_R[ranks, None] + np.arange(BLOCK_STEPS * WINDOW_BLOCKS)) % (
            BLOCK_STEPS * WINDOW_BLOCKS
        )  # oldest first
        seconds_RW = np.take_along_axis(self._steps_RW[ranks], order_RW, 1)
        logs_RBS = np.log(seconds_RW).reshape(len(ranks), WINDOW_BLOCKS, BLOCK_STEPS)
        medians_RB = np.median(logs_RBS, 2)
        # With two ranks, compare with the faster one; with more ranks, compare with the median.
        middle_B = np.sort(medians_RB, 0)[(len(ranks) - 1) // 2]
        over_RB = medians_RB - middle_B
        spread_R = np.median(np.abs(logs_RBS - medians_RB[..., None]).reshape(len(ranks), -1), 1)
        errors_R = SPREAD * MEDIAN_ERROR * spread_R / math.sqrt(BLOCK_STEPS)
        spread = SPREAD * np.median(np.abs(over_RB)) if len(ranks) > 2 else 0.0
        noise_R = np.maximum(np.hypot(errors_R, np.median(errors_R)), spread)
        limits_R = np.maximum(math.log(factor), NOISE * noise_R)
        means_R, usual = over_RB.mean(1), math.exp(np.median(middle_B))
        medians_R = np.median(seconds_RW, 1)
        again_R = over_RB.max(1) < limits_R / 2  # True if the rank was as fast as its peers for a complete window
        self._named -= set(ranks[again_R & np.isin(ranks, wanted)].tolist())
        slow_R = (means_R >= limits_R) & (over_RB.min(1) >= means_R / 2) & (medians_R - usual >= LEAST_SECONDS)
        found = [
            SlowRank(int(rank), float(seconds), usual)
            for rank, seconds in zip(ranks[slow_R], medians_R[slow_R], strict=True)
            if rank in wanted and rank not in self._named
        ]
        self._named |= {slow.rank for slow in found}
        return found
