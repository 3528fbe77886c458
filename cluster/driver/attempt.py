"""One attempt to run: its ranks as their agents last saw them, its progress, and what went wrong with it.

Ranks that are slower than those that do the same work, told from the noise of a busy machine.

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
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.cause import Cause, Kind, RankReport, name_cause
from cluster.incident import describe_incident, judge_failure, judge_hang, unpack_traces
from cluster.rank_watch import Patience, RankWatch
from cluster.topology import Placement
from conf.errors import EXIT_USER

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


NAMED_NODES = 8
"""Lost nodes that a cause tells about one by one; events.jsonl has a line for each."""


class Attempt(RankWatch):
    """Facts of one attempt; the supervisor decides what follows from them."""

    def __init__(self, number: int, placement: Placement, now: float, saved: int, patience: Patience):
        """saved: step of the newest checkpoint, on disk or in memory, when it begins."""
        names = {seat.rank: seat.node.name for seat in placement.seats}
        super().__init__(names, names, patience, now, saved)
        self.number, self.placement = number, placement
        self.ranks_of = {node: [seat.rank for seat in seats] for node, seats in placement.by_node().items()}
        self.lost: dict[str, str] = {}
        """Nodes that it lost, and how; they may be back in the cluster already."""
        self.cause: Cause | None = None
        self.hang_since: float | None = None
        self.stacks: dict[int, str] = {}
        self.rings: dict[int, bytes] = {}
        """What ranks communicated last, packed; empty of one without a ring."""
        self.incident: dict[str, Any] | None = None
        dp = placement.dp
        self._stragglers = Stragglers([range(stage * dp, (stage + 1) * dp) for stage in range(placement.pp)])

    @property
    def reachable(self) -> tuple[str, ...]:
        """All nodes with ranks that were not lost; of one of them ask `reaches`."""
        return tuple(node for node in self.ranks_of if node not in self.lost)

    def reaches(self, node: str) -> bool:
        return node in self.ranks_of and node not in self.lost

    @property
    def live_reports(self) -> list[RankReport]:
        """Ranks on nodes that answer."""
        return [self.reports[rank] for node in self.reachable for rank in self.ranks_of[node]]

    @property
    def broken(self) -> bool:
        return bool(self.lost or self.cause or self._bad)

    def count_repeated(self, reached: int) -> int:
        """Steps that it does a second time, when the run had worked on step `reached` before; it has begun itself."""
        assert self.first_step is not None
        return max(0, reached - min(self.first_step, self.saved + 1))

    def take(self, now: float, reports: Collection[RankReport]) -> None:
        """Remember what an agent says of its ranks."""
        for report in reports:
            if report.step != self.reports[report.rank].step and report.busy is not None:
                self._stragglers.take(report.rank, report.busy)
        super().take(now, reports)

    def is_settled(self, now: float, until: float) -> bool:
        """Whether to wait no longer for ranks to say why they failed, and for what they communicated last."""
        reports = self.live_reports
        if now >= until or any(report.said == EXIT_USER for report in reports):
            return True
        if self.hang_since is not None:
            said = all(report.rank in self.stacks or report.ended or report.state == "T" for report in reports)
        elif self.lost or self.cause:
            return True
        else:
            said = all(report.bad or report.ended for report in reports)
        return (said or any(report.certain for report in reports)) and self.rings.keys() >= {
            report.rank for report in reports
        }

    def judge(self, now: float) -> Cause:
        """The first failure, from all that is known; `incident` has the whole of it."""
        found = name_cause(self.live_reports, self.names)
        if found is not None and found.kind is Kind.user:
            return found
        if self.lost:
            return self._lost_nodes()
        if self.cause is not None:
            return self.cause
        traces, seconds = unpack_traces(self.rings), 0.0
        if self.hang_since is not None and (found is None or found.kind is not Kind.killed):
            seconds = now - self.hang_since
            found, finding = judge_hang(self.live_reports, traces, self.stacks, self.names, seconds)
        else:
            assert found is not None, "judged without a failure"
            found, finding = judge_failure(found, traces, self.stacks, self.names)
        if traces:
            self.incident = describe_incident(found, finding, traces, self.stacks, seconds)
        return found

    def _lost_nodes(self) -> Cause:
        nodes = {seat.node.id: seat.node for seat in self.placement.seats if seat.node.id in self.lost}
        told = [f"{nodes[id].name} ({nodes[id].address}): {why}" for id, why in self.lost.items()]
        more = f"; and {len(told) - NAMED_NODES} more nodes" if len(told) > NAMED_NODES else ""
        text = "; ".join(told[:NAMED_NODES]) + more
        ranks = tuple(rank for id in self.lost for rank in self.ranks_of[id])
        return Cause(Kind.node, text, ranks, tuple(nodes[id].name for id in self.lost))

    def new_stragglers(self, factor: float) -> list[SlowRank]:
        """Ranks that have become slow beside those that do the same work."""
        return self._stragglers.new(factor)
