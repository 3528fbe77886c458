"""Rank arithmetic, up to the paper's 2048 ranks, and the groups that torch really makes."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from conf.errors import UserError
from parallel.layout import Layout
from parallel.mesh import build_mesh, form_later
from tests.ranks import run_ranks


def test_v3_layout_groups_partition_the_world():
    layout = Layout(pp=16, dp=128, ep=64, ranks_per_node=8)
    assert layout.world == 2048 and layout.edp == 2
    for groups, size in (
        (layout.pp_groups(), 16),
        (layout.stage_groups(), 128),
        (layout.ep_groups(), 64),
        (layout.edp_groups(), 2),
        (layout.intra_groups(), 8),
        (layout.inter_groups(), 8),
    ):
        assert {len(group) for group in groups} == {size}
        assert sorted(rank for group in groups for rank in group) == list(range(2048))
    assert all(group == list(range(group[0], group[0] + 64)) for group in layout.ep_groups())
    assert {len({layout.node(rank) for rank in group}) for group in layout.ep_groups()} == {8}
    assert {len({layout.node(rank) for rank in group}) for group in layout.intra_groups()} == {1}


def test_context_groups_lie_inside_a_stage_and_experts_spread_over_them():
    layout = Layout(pp=2, dp=3, cp=4, ep=6, ranks_per_node=2)
    assert layout.world == 24 and layout.stage_ranks == 12 and layout.edp == 2
    assert layout.cp_groups()[1] == [4, 5, 6, 7] and layout.pp_groups()[1] == [1, 13]
    for rank in range(24):
        stage = rank % 12
        assert (layout.dp_rank(rank), layout.cp_rank(rank)) == divmod(stage, 4)
        assert [rank in group for group in layout.edp_groups()].count(True) == 1
    assert layout.edp_groups()[0] == [0, 6] and layout.stage_groups()[1] == list(range(12, 24))


@pytest.mark.parametrize("rank", [0, 777, 2047])
def test_v3_mesh_on_a_fake_process_group(rank):
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2048)
    try:
        mesh = build_mesh(Layout(pp=16, dp=128, ep=64, ranks_per_node=8))
        ranks = dist.get_process_group_ranks
        assert (mesh.pp_rank, mesh.dp_rank, mesh.ep_rank, mesh.edp_rank) == (
            rank // 128,
            rank % 128,
            rank % 64,
            rank % 128 // 64,
        )
        assert ranks(mesh.pp_group) == [p * 128 + rank % 128 for p in range(16)]
        assert ranks(mesh.stage_group) == [rank // 128 * 128 + d for d in range(128)]
        assert ranks(mesh.ep_group) == [rank // 64 * 64 + i for i in range(64)]
        assert ranks(mesh.edp_group) == [rank // 128 * 128 + rank % 64 + e * 64 for e in range(2)]
        assert ranks(mesh.intra_group) == [rank // 8 * 8 + i for i in range(8)]
        assert ranks(mesh.inter_group) == [rank // 64 * 64 + rank % 8 + n * 8 for n in range(8)]
    finally:
        dist.destroy_process_group()


def check_sums(rank):
    mesh = build_mesh(Layout(pp=2, dp=2, ep=2, ranks_per_node=2))
    for group, expected in (
        (mesh.pp_group, rank % 2 + rank % 2 + 2),
        (mesh.stages_group, rank % 2 + rank % 2 + 2),
        (mesh.stage_group, 1 if rank < 2 else 5),
        (mesh.edp_group, rank),
        (mesh.inter_group, rank),
    ):
        total = torch.tensor(float(rank))
        dist.all_reduce(total, group=group)
        assert total.item() == expected


def test_groups_on_real_ranks():
    run_ranks(check_sums, world_size=4)


def shared_groups(rank):
    """ep over all of dp, one node: three kinds of groups with the same members are one, as are those of one rank."""
    mesh = build_mesh(Layout(pp=2, dp=2, ep=2, ranks_per_node=2))
    assert mesh.stage_group is mesh.ep_group is mesh.intra_group
    assert mesh.edp_group is mesh.inter_group and dist.get_world_size(mesh.edp_group) == 1
    assert mesh.stages_group is mesh.ends_group and mesh.stages_group is not mesh.stage_group
    whole = build_mesh(Layout(dp=4, ep=4, ranks_per_node=2))
    assert whole.stage_group is whole.ep_group is dist.group.WORLD
    assert dist.get_process_group_ranks(whole.intra_group) == [rank // 2 * 2, rank // 2 * 2 + 1]


def test_groups_with_the_same_members_are_one():
    run_ranks(shared_groups, world_size=4)


def pipeline_groups(rank):
    """pp over all ranks, of which the group is formed at the start, and pp of two, whose ends are the whole pipeline."""
    for layout in (Layout(pp=4, ranks_per_node=4), Layout(pp=2, dp=2, ranks_per_node=4)):
        mesh = build_mesh(layout)
        others = [group for name, group in vars(mesh).items() if name.endswith("_group") and name != "pp_group"]
        assert all(group is not mesh.pp_group for group in [dist.group.WORLD, *others])
        assert dist.get_process_group_ranks(mesh.pp_group) == dist.get_process_group_ranks(mesh.stages_group)


def test_sends_of_a_pipeline_share_a_group_with_no_collective():
    run_ranks(pipeline_groups, world_size=4)


def test_a_bound_default_group_lets_others_form_later():
    """What form_later relies on: torch decides by this whether to split the communicator of all ranks at once."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        dist.group.WORLD.bound_device_id = torch.device("cpu", 0)
        form_later()
        assert dist.group.WORLD.bound_device_id is None
        group = dist.new_group([0])
        assert group.bound_device_id is None
    finally:
        dist.destroy_process_group()


def wrong_world(rank):
    with pytest.raises(UserError, match="number of ranks, 2"):
        build_mesh(Layout(pp=1, dp=4))


def test_degrees_must_multiply_to_the_world():
    run_ranks(wrong_world, world_size=2)


def test_expert_groups_must_fit_the_nodes():
    with pytest.raises(UserError, match="fill whole nodes"):
        _ = Layout(dp=12, ep=12, ranks_per_node=8).ep_ranks_per_node
