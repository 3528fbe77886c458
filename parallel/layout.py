"""The pipeline, stage, context, expert and expert-data groups of a layout, as plain arithmetic.

The ranks of a stage hold the same layers. Each has one pair of indices for its data, and one for its experts:

    rank = pp_rank * stage_ranks + stage_rank,   stage_ranks = dp * cp
    stage_rank = dp_rank * cp + cp_rank = edp_rank * ep + ep_rank

So context groups and expert-parallel groups are consecutive ranks, which should be on one node. Experts and ZeRO treat
ranks that share sequences like other ranks.
"""

from dataclasses import dataclass

from conf.errors import UserError
from conf.schema import Config, RankCounts


@dataclass(frozen=True)
class Layout(RankCounts):
    """Degrees of parallelism and the rank arithmetic that follows from them."""

    pp: int = 1
    dp: int = 1
    ep: int = 1
    ranks_per_node: int = 1
    cp: int = 1

    def __post_init__(self) -> None:
        assert self.stage_ranks % self.ep == 0, "conf/check.py comes first"

    @property
    def edp(self) -> int:
        """Number of copies of every expert."""
        return self.stage_ranks // self.ep

    def pp_rank(self, rank: int) -> int:
        return rank // self.stage_ranks

    def stage_rank(self, rank: int) -> int:
        return rank % self.stage_ranks

    def dp_rank(self, rank: int) -> int:
        """Return the rank's data-parallel index: which part of the batch the rank reads."""
        return self.stage_rank(rank) // self.cp

    def cp_rank(self, rank: int) -> int:
        """Return the rank's context-parallel index: which part of each sequence the rank reads."""
        return rank % self.cp

    def ep_rank(self, rank: int) -> int:
        return rank % self.ep

    def node(self, rank: int) -> int:
        return rank // self.ranks_per_node

    def pp_groups(self) -> list[list[int]]:
        return [[p * self.stage_ranks + s for p in range(self.pp)] for s in range(self.stage_ranks)]

    def stage_groups(self) -> list[list[int]]:
        return [[p * self.stage_ranks + s for s in range(self.stage_ranks)] for p in range(self.pp)]

    def cp_groups(self) -> list[list[int]]:
        return [[first + i for i in range(self.cp)] for first in range(0, self.world, self.cp)]

    def ep_groups(self) -> list[list[int]]:
        return [[first + i for i in range(self.ep)] for first in range(0, self.world, self.ep)]

    def edp_groups(self) -> list[list[int]]:
        return [
            [p * self.stage_ranks + e * self.ep + i for e in range(self.edp)]
            for p in range(self.pp)
            for i in range(self.ep)
        ]

    @property
    def ep_ranks_per_node(self) -> int:
        """Number of ranks of one expert group on one node. It is the same for all nodes and groups."""
        inside = min(self.ep, self.ranks_per_node)
        if self.ep % inside or self.ranks_per_node % inside:
            raise UserError(
                "parallel.ep",
                self.ep,
                f"an expert group must fill whole nodes, or divide a node of {self.ranks_per_node} ranks evenly",
                f"use a multiple or a divisor of {self.ranks_per_node}",
            )
        return inside

    def ends_groups(self) -> list[list[int]]:
        """Return the first and last rank of each pipeline, which share the embedding of MTP modules."""
        return [[group[0], group[-1]] if self.pp > 1 else group for group in self.pp_groups()]

    def intra_groups(self) -> list[list[int]]:
        """Return, per expert group and node, this group's ranks on this node."""
        size = self.ep_ranks_per_node
        return [group[i : i + size] for group in self.ep_groups() for i in range(0, self.ep, size)]

    def inter_groups(self) -> list[list[int]]:
        """Return, for each expert group and each position on a node, the group's ranks at this position."""
        size = self.ep_ranks_per_node
        return [group[i::size] for group in self.ep_groups() for i in range(size)]


def read_layout(config: Config, node: int) -> Layout:
    """Return the layout of a recipe. node: number of ranks per node if cluster.ranks_per_node is 0."""
    parallel = config.parallel
    return Layout(parallel.pp, parallel.dp, parallel.ep, config.cluster.ranks_per_node or node, parallel.cp)
