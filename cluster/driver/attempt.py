"""One attempt of a run: reports of the ranks, progress, and failure."""

from collections.abc import Collection
from typing import Any

from cluster.cause import Cause, Kind, RankReport, name_cause
from cluster.driver.straggler import Stragglers
from cluster.incident import describe_incident, judge_failure, judge_hang, unpack_traces
from cluster.patience import Patience
from cluster.rank_watch import RankWatch
from cluster.topology import Placement
from conf.errors import EXIT_USER

NAMED_NODES = 8
"""Maximum number of lost nodes that a cause names."""


class Attempt(RankWatch):
    """The state of one attempt, about which the supervisor decides."""

    def __init__(self, number: int, placement: Placement, now: float, saved: int, patience: Patience):
        """Begin an attempt. saved: step of the newest checkpoint, on disk or in memory; 0 without one, -1 if unknown."""
        names = {seat.rank: seat.node.name for seat in placement.seats}
        super().__init__(names, names, patience, now, saved)
        self.number, self.placement = number, placement
        self.ranks_of = {node: [seat.rank for seat in seats] for node, seats in placement.by_node.items()}
        self.lost: dict[str, str] = {}
        """Why the attempt lost a node, by id; the node may have returned."""
        self.cause: Cause | None = None
        self.hang_since: float | None = None
        self.stacks: dict[int, str] = {}
        self.rings: dict[int, bytes] = {}
        """Compressed communication ring of each rank, or empty (cluster/comm_ring.py)."""
        self.incident: dict[str, Any] | None = None
        dp = placement.dp
        self.stragglers = Stragglers([range(stage * dp, (stage + 1) * dp) for stage in range(placement.pp)])

    @property
    def reachable(self) -> tuple[str, ...]:
        """Nodes that run ranks of the attempt and were not lost. For one node, call `reaches`."""
        return tuple(node for node in self.ranks_of if node not in self.lost)

    def reaches(self, node: str) -> bool:
        return node in self.ranks_of and node not in self.lost

    @property
    def live_reports(self) -> list[RankReport]:
        """The newest report of each rank on the reachable nodes."""
        return [self.reports[rank] for node in self.reachable for rank in self.ranks_of[node]]

    @property
    def broken(self) -> bool:
        return bool(self.lost or self.cause or self._bad)

    def count_repeated(self, reached: int) -> int:
        """Return the number of steps that this attempt repeats; call it after the first step. reached: highest step
        before this attempt.
        """
        return max(0, reached - self.begin)

    def take(self, now: float, reports: Collection[RankReport]) -> None:
        """Store the reports that an agent sent about its ranks."""
        for report in reports:
            if report.step != self.reports[report.rank].step and report.busy is not None:
                self.stragglers.take(report.rank, report.busy)
        super().take(now, reports)

    def look_again(self, hang_since: float | None) -> None:
        """Clear the stacks and rings, so that the driver collects new ones.

        hang_since: time of the last progress if the ranks hang; None if a rank failed.
        """
        self.hang_since = hang_since
        self.stacks, self.rings, self.incident = {}, {}, None

    def is_settled(self, now: float, until: float) -> bool:
        """Whether the wait for failure reports, stacks and rings is over."""
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
        """Return the first failure of all reports. Stores details in `incident`."""
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
        causes = [f"{nodes[id].name} ({nodes[id].address}): {why}" for id, why in self.lost.items()]
        more = f"; and {len(causes) - NAMED_NODES} more nodes" if len(causes) > NAMED_NODES else ""
        text = "; ".join(causes[:NAMED_NODES]) + more
        ranks = tuple(rank for id in self.lost for rank in self.ranks_of[id])
        return Cause(Kind.node, text, ranks, tuple(nodes[id].name for id in self.lost))
