"""The pipeline, stage, context, expert and expert-data groups of a layout, as plain arithmetic.

Ranks are numbered with the pipeline outermost. The ranks of a stage hold the same layers. They have two numberings, one
by the data that they read and one by the experts that they hold:

    rank = pp_rank * stage_ranks + stage_rank,   stage_ranks = dp * cp
    stage_rank = dp_rank * cp + cp_rank = edp_rank * ep + ep_rank

So the ranks of one context group are contiguous, and so are those of one expert-parallel group (they should share
nodes). Pipeline neighbours have the same index in neighbouring blocks. For experts and for ZeRO, a rank that shares
sequences counts like a rank with its own sequences.
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
        """Copies of every expert: ranks of a stage that hold the same experts."""
        return self.stage_ranks // self.ep

    def pp_rank(self, rank: int) -> int:
        return rank // self.stage_ranks

    def stage_rank(self, rank: int) -> int:
        return rank % self.stage_ranks

    def dp_rank(self, rank: int) -> int:
        """Return the index of the rank's share of the batch."""
        return self.stage_rank(rank) // self.cp

    def cp_rank(self, rank: int) -> int:
        """Return the index of the rank's share of each sequence."""
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
        """Ranks of one expert group that share a node; every expert group spans nodes in the same way."""
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
        """Return the first and last rank of every pipeline, which both hold the embedding if the model has MTP
        modules.
        """
        return [[group[0], group[-1]] if self.pp > 1 else group for group in self.pp_groups()]

    def intra_groups(self) -> list[list[int]]:
        """Return the ranks of one expert group on one node, for each."""
        size = self.ep_ranks_per_node
        return [group[i : i + size] for group in self.ep_groups() for i in range(0, self.ep, size)]

    def inter_groups(self) -> list[list[int]]:
        """Return the ranks of one expert group that have the same index inside their nodes."""
        size = self.ep_ranks_per_node
        return [group[i::size] for group in self.ep_groups() for i in range(size)]


def read_layout(config: Config, node: int) -> Layout:
    """Return the layout of a recipe. node: ranks per node, unless cluster.ranks_per_node sets them."""
    parallel = config.parallel
    return Layout(parallel.pp, parallel.dp, parallel.ep, config.cluster.ranks_per_node or node, parallel.cp)
