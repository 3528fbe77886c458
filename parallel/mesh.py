"""The process groups of every rank; parallel/layout.py lists their members.

On GPUs, a group's communicator takes hundreds of megabytes on each rank. So one group serves all purposes that have the
same members, and a communicator is created at the first collective of its group. Groups of one rank and groups that a
layout does not use never get a communicator.

The group for a pipeline's sends and receives is the exception. No collective uses its communicator. If a communicator
is created together with its group, torch runs all transfers of a rank one after another on one stream, and a concurrent
broadcast can hang. pytorch pull request 172668 measured 7,300 tokens/s in this case and 9,700 tokens/s otherwise. In a
separate group, torch opens one communicator per pair of neighbours, so that transfers to both neighbours overlap. torch
2.13 does this even if a schedule sends several transfers at once. Older versions batch these transfers (pytorch issue
175225). They work too, but the transfers do not overlap.
"""

from dataclasses import dataclass, fields
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d

from conf.check import check_world
from parallel.layout import Layout

Partition = tuple[tuple[int, ...], ...]
"""How the ranks are divided into groups. The value is a tuple, so two divisions can be compared."""


def partition(groups: list[list[int]]) -> Partition:
    return tuple(map(tuple, groups))


@dataclass
class Mesh:
    """One rank's position in the layout, and its process groups."""

    layout: Layout
    rank: int
    pp_group: ProcessGroup
    """Ranks of this rank's pipeline. Only sends and receives between stages use this group."""
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
    """First and last rank of this rank's pipeline; None on the ranks between them."""
    inter_group: ProcessGroup
    """Ranks of this rank's expert group that have the same index on their nodes as this rank."""

    def wait_at_most(self, seconds: float) -> None:
        """Set the timeout of all later collectives in all groups of this rank."""
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

    Call this function after the default group, which is bound to a device, has created its communicator. Otherwise
    torch splits the communicator of all ranks once for each new group, even for groups of other ranks and groups of one
    rank. With 2048 ranks these are some 1800 splits.
    """
    _all_ranks().bound_device_id = None


def build_mesh(layout: Layout, timeout: timedelta | None = None) -> Mesh:
    """Create the groups of this rank in the default process group. Every rank must call this function.

    timeout: maximum time that a collective may wait. New groups do not take over the timeout of the default group. The
    default group serves as the group of all ranks.
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
