"""Placement: groups stay together, pipelines stay whole, and a plan for 2048 devices takes no time."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.show import main as show
from cluster.topology import Node, Placement, StageShape, place, placement_table, require
from conf.errors import EXIT_OK, EXIT_USER, UserError


def cluster(count: int, devices: int = 8, rack: int = 8) -> list[Node]:
    """Nodes in shuffled order, `rack` of them in a rack."""
    nodes = [
        Node(f"id{i}", f"n{i}", f"10.0.{i // 200}.{i % 200}", devices, f"r{i // rack}" if rack else "")
        for i in range(count)
    ]
    random.Random(count).shuffle(nodes)
    return nodes


def groups(placement: Placement) -> list[list]:
    """Seats of every expert group."""
    return [list(placement.seats[i : i + placement.ep]) for i in range(0, placement.world, placement.ep)]


def largest(nodes: list[Node], pp: int, dp: int, ep: int) -> Placement | None:
    """With as many data-parallel ranks as fit, at most dp."""
    return place(nodes, pp, [StageShape(size, ep) for size in range(dp, 0, -ep)])


def node_number(seat) -> int:
    return int(seat.node.name[1:])


def test_deepseek_v3_on_2048_devices_in_under_a_second():
    nodes = cluster(258)
    started = time.perf_counter()
    placement = largest(nodes, pp=16, dp=128, ep=64)
    placement_table(placement)
    assert time.perf_counter() - started < 1
    assert placement.world == 2048
    assert [seat.rank for seat in placement.seats] == list(range(2048))
    for group in groups(placement):
        assert len({seat.node.id for seat in group}) == 8  # 64 ranks on 8 nodes of 8
        assert len({seat.node.rack for seat in group}) == 1
    for stage in range(15):  # the next stage of a block is the next group of 8 nodes
        for rank in (0, 64, 127):
            here, there = placement.seats[stage * 128 + rank], placement.seats[(stage + 1) * 128 + rank]
            assert node_number(there) - node_number(here) == 8
            assert there.local_rank == here.local_rank
    assert [node.name for node in placement.spares] == ["n256", "n257"]


def test_a_pipeline_of_small_groups_fits_one_node():
    placement = largest(cluster(2, devices=8), pp=2, dp=8, ep=4)
    for block in range(2):
        stages = [placement.seats[stage * 8 + block * 4] for stage in range(2)]
        assert stages[0].node is stages[1].node


def test_a_lost_node_costs_one_block_and_spares_come_first():
    nodes = sorted(cluster(5, devices=2), key=lambda node: node.id)
    full = largest(nodes, pp=2, dp=4, ep=2)
    assert full.dp == 4 and [node.name for node in full.spares] == ["n4"]
    with_spare = largest([node for node in nodes if node.name != "n1"], pp=2, dp=4, ep=2)
    assert with_spare.dp == 4 and not with_spare.spares
    smaller = largest([node for node in nodes if node.name not in ("n1", "n2")], pp=2, dp=4, ep=2)
    assert smaller.dp == 2 and len(smaller.spares) == 1
    assert largest(nodes[:1], pp=2, dp=4, ep=2) is None


def test_shapes_are_tried_in_their_order_and_only_what_is_allowed_is_taken():
    nodes, shapes = cluster(7, devices=1), [StageShape(8, 1), StageShape(6, 2), StageShape(7, 1), StageShape(4, 1)]
    assert place(nodes, 1, shapes).shape == StageShape(6, 2)
    assert place(nodes, 1, shapes, lambda shape: shape.ep == 1).dp == 7
    assert place(nodes, 1, shapes, lambda shape: shape.dp == 8) is None


def test_after_a_loss_ranks_stay_where_they_were_and_a_spare_of_the_rack_takes_the_place():
    nodes = cluster(20, devices=2, rack=10)
    before = largest(
        nodes, pp=1, dp=32, ep=8
    )  # 4 groups on 4 nodes each, 2 in every rack; 2 nodes of every rack are spare
    assert {node.name for node in before.spares} == {"n8", "n9", "n18", "n19"}
    left = [node for node in nodes if node.name != "n12"]
    after = place(left, 1, [before.shape], near=before)
    moved = [(old, new) for old, new in zip(before.seats, after.seats, strict=True) if old != new]
    assert {(old.node.name, new.node.name) for old, new in moved} == {("n12", "n18")}
    assert [old.local_rank for old, _ in moved] == [new.local_rank for _, new in moved] == [0, 1]
    assert {node.name for node in after.spares} == {"n8", "n9", "n19"}


def test_ranks_move_where_groups_would_else_be_spread_over_racks():
    nodes = cluster(12, devices=2, rack=4)
    before = largest(nodes, pp=1, dp=16, ep=8)  # a group in each of two racks of 4 nodes, the third rack is spare
    after = place([node for node in nodes if node.name != "n1"], 1, [before.shape], near=before)
    assert all(len({seat.node.rack for seat in group}) == 1 for group in groups(after))


def test_a_spare_that_has_too_few_devices_takes_nobodys_place():
    """Two ranks of a node need a node of two devices; with none of them the ranks are given out anew."""
    nodes = cluster(3, devices=2, rack=0)
    small = Node("small", "m0", "10.0.9.9", 1)  # the first of the spares
    before = place([*nodes, small], 1, [StageShape(4, 2), StageShape(2, 2)])
    lost = before.seats[0].node
    after = place([node for node in (*nodes, small) if node != lost], 1, [before.shape], near=before)
    assert all(seat.node.devices == 2 for seat in after.seats) and small in after.spares


def test_the_table_counts_expert_groups_in_their_stage():
    """Stages of two groups of two: the second stage has groups 0 and 1 as well."""
    table = placement_table(place(cluster(4, devices=2, rack=0), 2, [StageShape(4, 2)]))
    assert [line.split()[3:] for line in table.splitlines()[2:]] == [
        ["0", "0", "0-1"],
        ["0", "1", "2-3"],
        ["1", "0", "4-5"],
        ["1", "1", "6-7"],
    ]


def test_too_few_devices_say_what_would_fit():
    with pytest.raises(UserError, match=r"parallel\.dp=4 fits"):
        require(cluster(2, devices=2), pp=1, dp=8, ep=2)


def test_racks_of_odd_size_leave_few_groups_straddling():
    placement = largest(cluster(10, devices=2, rack=5), pp=1, dp=20, ep=4)
    straddling = [group for group in groups(placement) if len({seat.node.rack for seat in group}) > 1]
    assert len(straddling) == 1


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    devices=st.lists(st.integers(0, 9), max_size=12),
    pp=st.integers(1, 4),
    ep=st.integers(1, 8),
    blocks=st.integers(1, 4),
)
def test_any_cluster(devices, pp, ep, blocks):
    nodes = [Node(str(i), f"n{i}", f"10.0.0.{i}", count, f"r{i // 4}") for i, count in enumerate(devices)]
    placement = largest(nodes, pp, blocks * ep, ep)
    if placement is None:
        assert sum(count // ep for count in devices) < pp  # not even whole groups on single nodes
        return
    assert placement.dp <= blocks * ep and placement.dp % ep == 0
    assert [seat.rank for seat in placement.seats] == list(range(pp * placement.dp))
    taken = {(seat.node.id, seat.local_rank) for seat in placement.seats}
    assert len(taken) == placement.world  # no device twice
    assert all(seat.local_rank < seat.node.devices for seat in placement.seats)
    for seats in placement.by_node.values():
        devices_of_node = [seat.local_rank for seat in seats]
        assert devices_of_node == sorted(devices_of_node)
    used = {seat.node.id for seat in placement.seats}
    assert used.isdisjoint(node.id for node in placement.spares)
    assert len(used) + len(placement.spares) == len(nodes)
    shares = {
        sum(seat.node.id == node for seat in group)
        for group in groups(placement)
        for node in {s.node.id for s in group}
    }
    assert len(shares) == 1  # every expert group is cut the same way


def test_the_table_is_shown_without_starting_anything(capsys):
    assert show(["4x2/2", "parallel.dp=6", "parallel.ep=2", "batch_size=12", "micro_batch_size=1"]) == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 ranks = pp 1 x dp 6 (ep 2) on 3 nodes, 1 spare"
    assert lines[2].split() == ["n0", "r0", "10.0.0.0", "0", "0", "0-1"] and lines[-1] == "spare: n3"
    assert show(["4x2", "parallel.dp=16", "batch_size=16", "micro_batch_size=1"]) == EXIT_USER
    assert "parallel.dp=8 fits" in capsys.readouterr().err
    assert show(["4x2", "conf=tinny"]) == EXIT_USER
    assert "conf = tinny\n  rule: must be one of" in capsys.readouterr().err
