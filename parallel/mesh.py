"""The process groups of every rank; parallel/layout.py lists their members.

On GPUs, a communicator takes hundreds of megabytes on each rank. So one group serves all purposes with the same
members, and a communicator is created at its group's first collective.

The exception is the separate group for a pipeline's sends and receives. If its communicator is created with the group,
torch runs all transfers of a rank in sequence, and a concurrent broadcast can hang. Otherwise torch opens one
communicator per pair of neighbours, so transfers to both neighbours overlap (not before torch 2.13; pytorch issue
175225).
"""

from dataclasses import dataclass, fields
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d

from conf.check import check_world
from parallel.layout import Layout

Partition = tuple[tuple[int, ...], ...]
"""Division of the ranks into groups, as tuples: equal divisions compare equal."""


def partition(groups: list[list[int]]) -> Partition:
    return tuple(map(tuple, groups))


@dataclass
class Mesh:
    """One rank's position in the layout, and its process groups."""

    layout: Layout
    rank: int
    pp_group: ProcessGroup
    """Ranks of this rank's pipeline, only for sends and receives."""
    stages_group: ProcessGroup
    """Ranks of this rank's pipeline, for collectives."""
    stage_group: ProcessGroup
    """Ranks that hold the same stage as this rank."""
    cp_group: ProcessGroup
    """Ranks that share sequences with this rank."""
    ep_group: ProcessGroup
    edp_group: ProcessGroup
    intra_group: ProcessGroup
    """Ranks of this rank's expert group on this rank's node."""
    ends_group: ProcessGroup | None
    """First and last rank of this pipeline; None on ranks between them."""
    inter_group: ProcessGroup
    """Ranks of this rank's expert group that have the same position on their nodes as this rank."""

    def wait_at_most(self, seconds: float) -> None:
        """Set the timeout of later collectives in this rank's groups."""
        groups = {group for field in fields(self) if isinstance(group := getattr(self, field.name), ProcessGroup)}
        for group in {_all_ranks(), *groups}:
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    @property
    def pp_rank(self) -> int:
        return self.layout.pp_rank(self.rank)

    @property
    def stage_rank(self) -> int:
        return self.layout.stage_rank(self.rank)

    @property
    def dp_rank(self) -> int:
        return self.layout.dp_rank(self.rank)

    @property
    def cp_rank(self) -> int:
        return self.layout.cp_rank(self.rank)

    @property
    def ep_rank(self) -> int:
        return self.layout.ep_rank(self.rank)

    @property
    def edp_rank(self) -> int:
        return self.stage_rank // self.layout.ep


def _all_ranks() -> ProcessGroup:
    assert dist.group.WORLD is not None, "the process group comes first"
    return dist.group.WORLD


def form_later() -> None:
    """Make new groups create their communicators at their first collective.

    Call this once the default group has its communicator. Otherwise torch splits it for each new group: some 1800
    splits for 2048 ranks.
    """
    _all_ranks().bound_device_id = None


def build_mesh(layout: Layout, timeout: timedelta | None = None) -> Mesh:
    """Create the groups of this rank. Every rank must call this function.

    timeout: maximum wait of a collective. The groups do not inherit the timeout of the default group.
    """
    world = dist.get_world_size()
    check_world(layout.pp, layout.dp, layout.cp, world, f"the number of ranks, {world}")
    rank = dist.get_rank()
    made: dict[Partition, ProcessGroup | None] = {(tuple(range(world)),): _all_ranks()}

    def make(groups: list[list[int]]) -> ProcessGroup | None:
        group, _ = dist.new_subgroups_by_enumeration(groups, timeout=timeout)
        assert not isinstance(group, int)
        return group

    def mine_if_any(groups: list[list[int]]) -> ProcessGroup | None:
        key = partition(groups)
        if key not in made:
            made[key] = make(groups)
        return made[key]

    def mine(groups: list[list[int]]) -> ProcessGroup:
        group = mine_if_any(groups)
        assert group is not None, "every rank is in one of them"
        return group

    stages = mine(layout.pp_groups())
    sends = make(layout.pp_groups()) if layout.pp > 1 else stages
    assert sends is not None, "every rank is in one pipeline"
    return Mesh(
        layout=layout,
        rank=rank,
        pp_group=sends,
        stages_group=stages,
        stage_group=mine(layout.stage_groups()),
        cp_group=mine(layout.cp_groups()),
        ep_group=mine(layout.ep_groups()),
        edp_group=mine(layout.edp_groups()),
        ends_group=mine_if_any(layout.ends_groups()),
        intra_group=mine(layout.intra_groups()),
        inter_group=mine(layout.inter_groups()),
    )
