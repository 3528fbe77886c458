"""Ranks that are slower than those that do the same work, told from the noise of a busy machine.

A rank says after every step how long its own work took. Its peers are the ranks of the same pipeline stage. Of the last
WINDOW_BLOCKS x BLOCK_STEPS of every rank, the median of each block of steps is set beside the median of the peers' medians in that
block, as a logarithm; one slow step, or a burst that ends, moves no more than a block. A rank is slow if

    - in the mean over the blocks it takes `factor` times its peers' time,
    - that mean is at least NOISE times the noise of one block, which is NOISE x sqrt(WINDOW_BLOCKS) of its own standard errors,
    - and no block has less than half of it: it lasts.

The noise of a block is the larger one of two: the standard error of its median, from the spread of single steps inside the
blocks; and the spread of the peers' blocks around each other, which also sees noise that lasts for many steps.

It is named once, and once more only after it was as fast as its peers for a whole window.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK_STEPS, WINDOW_BLOCKS = 10, 8
"""Steps of a block, and blocks of the window."""
NOISE = 2.0
SPREAD = 1.4826
"""Standard deviation of normal noise over the median of its sizes."""
MEDIAN_ERROR = 1.2533
"""Standard error of a median over that of a mean."""
LEAST_SECONDS = 0.01
"""A step: less is nobody's concern."""
COUNTED_SECONDS = 1e-9
"""Seconds that a step counts at least, as its logarithm is taken."""
LONE_FACTOR = 2.0
"""A stage of one rank has no peers. It is set beside all ranks, whose work may differ by nature, and must stand out by this."""


@dataclass(frozen=True)
class SlowRank:
    """A rank whose own work takes longer than that of the others; seconds per step."""

    rank: int
    seconds: float
    median: float


class Stragglers:
    """Takes the times of single ranks and names those that are slow."""

    def __init__(self, stages: Sequence[Sequence[int]]):
        """stages: ranks that do the same work, stage by stage; the ranks of all stages are numbered from 0."""
        everyone = [rank for ranks in stages for rank in ranks]
        self._groups = [np.array(ranks) for ranks in stages if len(ranks) > 1]
        self._lone = np.array([ranks[0] for ranks in stages if len(ranks) == 1], int)
        self._everyone = np.array(everyone) if len(self._lone) and len(everyone) > 1 else None
        self._steps_RW = np.ones((len(everyone), BLOCK_STEPS * WINDOW_BLOCKS))
        """Seconds of the newest steps of each rank; step s of a rank is in column s modulo the window."""
        self._seen_R = np.zeros(len(everyone), int)
        self._filled = 0
        """Blocks that ranks have filled, over all ranks."""
        self._judged = 0
        """Blocks of steps behind the last look."""
        self._named: set[int] = set()

    def take(self, rank: int, busy: float) -> None:
        """Seconds of a rank's own work in its newest step."""
        seen = self._seen_R[rank]
        self._steps_RW[rank, seen % (BLOCK_STEPS * WINDOW_BLOCKS)] = max(busy, COUNTED_SECONDS)
        self._seen_R[rank] = seen + 1
        self._filled += (seen + 1) % BLOCK_STEPS == 0

    def new(self, factor: float) -> list[SlowRank]:
        """Ranks that became slow since the last call; looks only when all ranks have a block of steps more."""
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
        """The wanted ranks that became slow beside `ranks`. Shapes: R ranks, B blocks, S steps of a block."""
        order_RW = (self._seen_R[ranks, None] + np.arange(BLOCK_STEPS * WINDOW_BLOCKS)) % (
            BLOCK_STEPS * WINDOW_BLOCKS
        )  # oldest first
        seconds_RW = np.take_along_axis(self._steps_RW[ranks], order_RW, 1)
        logs_RBS = np.log(seconds_RW).reshape(len(ranks), WINDOW_BLOCKS, BLOCK_STEPS)
        medians_RB = np.median(logs_RBS, 2)
        # Of two ranks the faster one is the measure, of more the middle one.
        middle_B = np.sort(medians_RB, 0)[(len(ranks) - 1) // 2]
        over_RB = medians_RB - middle_B
        spread_R = np.median(np.abs(logs_RBS - medians_RB[..., None]).reshape(len(ranks), -1), 1)
        errors_R = SPREAD * MEDIAN_ERROR * spread_R / math.sqrt(BLOCK_STEPS)
        spread = SPREAD * np.median(np.abs(over_RB)) if len(ranks) > 2 else 0.0
        noise_R = np.maximum(np.hypot(errors_R, np.median(errors_R)), spread)
        limits_R = np.maximum(math.log(factor), NOISE * noise_R)
        means_R, usual = over_RB.mean(1), math.exp(np.median(middle_B))
        medians_R = np.median(seconds_RW, 1)
        again_R = over_RB.max(1) < limits_R / 2  # as fast as the others for a whole window
        self._named -= set(ranks[again_R & np.isin(ranks, wanted)].tolist())
        slow_R = (means_R >= limits_R) & (over_RB.min(1) >= means_R / 2) & (medians_R - usual >= LEAST_SECONDS)
        found = [
            SlowRank(int(rank), float(seconds), usual)
            for rank, seconds in zip(ranks[slow_R], medians_R[slow_R], strict=True)
            if rank in wanted and rank not in self._named
        ]
        self._named |= {slow.rank for slow in found}
        return found
