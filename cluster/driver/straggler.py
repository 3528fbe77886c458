"""Ranks that are slower than those that do the same work, told from the noise of a busy machine.

A rank says after every step how long its own work took. Its peers are the ranks of the same pipeline stage. Of the last
BLOCKS x BLOCK steps of every rank, the median of each block of steps is set beside the median of the peers' medians in that
block, as a logarithm; one slow step, or a burst that ends, moves no more than a block. A rank is slow if

    - in the mean over the blocks it takes `factor` times its peers' time,
    - that mean is at least NOISE times the noise of one block, which is NOISE x sqrt(BLOCKS) of its own standard errors,
    - and no block has less than half of it: it lasts.

The noise of a block is the larger one of two: the standard error of its median, from the spread of single steps inside the
blocks; and the spread of the peers' blocks around each other, which also sees noise that lasts for many steps.

It is named once, and once more only after it was as fast as its peers for a whole window.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

BLOCK, BLOCKS = 10, 8
"""Steps of a block, and blocks of the window."""
NOISE = 2.0
SPREAD = 1.4826
"""Standard deviation of normal noise over the median of its sizes."""
MEDIAN_ERROR = 1.2533
"""Standard error of a median over that of a mean."""
LEAST_SECONDS = 0.01
"""A step: less is nobody's concern."""
LONE_FACTOR = 2.0
"""A stage of one rank has no peers. It is set beside all ranks, whose work may differ by nature, and must stand out by this."""


@dataclass(frozen=True)
class Slow:
    """A rank whose own work takes longer than that of the others; seconds per step."""

    rank: int
    seconds: float
    median: float


class Stragglers:
    """Takes the times of single ranks and names those that are slow."""

    def __init__(self, stages: Sequence[Sequence[int]]):
        """stages: ranks that do the same work, stage by stage."""
        everyone = [rank for ranks in stages for rank in ranks]
        self._groups = [list(ranks) for ranks in stages if len(ranks) > 1]
        self._lone = {ranks[0] for ranks in stages if len(ranks) == 1}
        self._everyone = everyone if self._lone and len(everyone) > 1 else []
        self._steps: dict[int, deque[float]] = {rank: deque(maxlen=BLOCK * BLOCKS) for rank in everyone}
        self._seen = dict.fromkeys(everyone, 0)
        self._judged = 0
        """Blocks of steps behind the last look."""
        self._named: set[int] = set()

    def take(self, rank: int, busy: float) -> None:
        """Seconds of a rank's own work in its newest step."""
        self._steps[rank].append(busy)
        self._seen[rank] += 1

    def new(self, factor: float) -> list[Slow]:
        """Ranks that became slow since the last call; looks only when all ranks have a block of steps more."""
        blocks = min(self._seen.values()) // BLOCK
        if not factor or blocks < BLOCKS or blocks == self._judged:
            return []
        self._judged = blocks
        found = [slow for ranks in self._groups for slow in self._judge(ranks, factor, set(ranks))]
        if self._everyone:
            found += self._judge(self._everyone, max(factor, LONE_FACTOR), self._lone)
        return sorted(found, key=lambda slow: slow.rank)

    def _judge(self, ranks: Sequence[int], factor: float, wanted: set[int]) -> list[Slow]:
        """Those of the wanted ranks that became slow beside these."""
        logs = {rank: _blocks([math.log(max(s, 1e-9)) for s in self._steps[rank]]) for rank in ranks}
        medians = {rank: [statistics.median(block) for block in blocks] for rank, blocks in logs.items()}
        # Of two ranks the faster one is the measure, of more the middle one.
        middle = [statistics.median_low(medians[rank][block] for rank in ranks) for block in range(BLOCKS)]
        over = {rank: [mine - its for mine, its in zip(medians[rank], middle, strict=True)] for rank in ranks}
        errors = {
            rank: SPREAD
            * MEDIAN_ERROR
            * statistics.median(abs(s - m) for block, m in zip(logs[rank], medians[rank], strict=True) for s in block)
            / math.sqrt(BLOCK)
            for rank in ranks
        }
        error = statistics.median(errors.values())
        spread = SPREAD * statistics.median(abs(d) for rank in ranks for d in over[rank]) if len(ranks) > 2 else 0.0
        return [
            slow
            for rank in ranks
            if rank in wanted
            and (slow := self._changed(rank, over[rank], max(math.hypot(errors[rank], error), spread), factor, middle))
        ]

    def _changed(
        self, rank: int, over: Sequence[float], noise: float, factor: float, middle: Sequence[float]
    ) -> Slow | None:
        """The rank, if it is slow and was not; forgets that it was named once it is as fast as the others again."""
        mean, limit = statistics.fmean(over), max(math.log(factor), NOISE * noise)
        seconds, usual = statistics.median(self._steps[rank]), math.exp(statistics.median(middle))
        if max(over) < limit / 2:
            self._named.discard(rank)
        if rank in self._named or mean < limit or min(over) < mean / 2 or seconds - usual < LEAST_SECONDS:
            return None
        self._named.add(rank)
        return Slow(rank, seconds, usual)


def _blocks(values: Sequence[float]) -> list[Sequence[float]]:
    return [values[start : start + BLOCK] for start in range(0, BLOCK * BLOCKS, BLOCK)]
