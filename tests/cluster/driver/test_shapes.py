"""The layouts that a run may shrink to: those that rules and memory allow, the fastest first, and why nodes are
idle."""

import json
from functools import partial
from types import SimpleNamespace

import pytest

from cluster.driver import messages as m
from cluster.driver.shapes import LAYOUTS_FILE, Shapes, digest_of, with_shape
from cluster.node import preflight
from cluster.topology import Node, Placement, StageShape, place
from conf.check import check
from conf.load import compose, write_config
from tests.cluster.world import World, shapes_of

GB = 10**9
NEEDED = {64: {128: 88, 64: 91}, 32: {96: 95, 32: 101}, 16: {112: 103, 16: 117}, 8: {120: 124, 8: 140}, 4: {124: 165}}
"""Gigabytes of a device by ep and dp, about what the plan says of the paper's model."""


def nodes_of(count: int, gigabytes: int) -> list[Node]:
    return [Node(f"id{i}", f"n{i}", f"10.0.0.{i}", 8, f"r{i // 8}", gigabytes * GB) for i in range(count)]


@pytest.fixture(scope="module")
def paper(tmp_path_factory) -> Shapes:
    """The paper's layout, pp 16, dp 128, ep 64 on 256 nodes of 8, and a plan."""
    folder = tmp_path_factory.mktemp("paper")
    config = compose("conf=deepseek_v3", "data.path=none", "cluster=ray")
    write_config(config, str(folder / "config.yaml"))
    layouts = [{"dp": dp, "ep": ep, "bytes": size * GB} for ep in NEEDED for dp, size in NEEDED[ep].items()]
    plan = {"config": digest_of(folder), "layouts": layouts, "problem": None}
    (folder / LAYOUTS_FILE).write_text(json.dumps(plan))
    return Shapes(config, folder)


def choose(shapes: Shapes, nodes: list[Node]) -> Placement:
    return place(nodes, shapes.pp, [shapes.own, *shapes.smaller], partial(shapes.allows, nodes=nodes))


@pytest.mark.slow
def test_a_lost_node_of_256_idles_as_few_as_memory_allows(paper):
    nodes = nodes_of(256, gigabytes=141)
    assert choose(paper, nodes).shape == paper.own and not choose(paper, nodes).spares
    found = choose(paper, nodes[1:])  # a block of 16 expert groups of 8 has 16 nodes
    assert (found.dp, found.ep, len(found.spares)) == (120, 8, 15)
    assert found.shape.micro_batches == 128 and paper.own.micro_batches == 120
    why = paper.why_idle(found.shape, nodes[1:])
    assert why == "pp 16 x dp 127 (ep 1) would use more nodes, but the plan does not contain this layout"
    assert "pp 16 x dp 8 (ep 8), takes 128 devices" in paper.why_nothing([]), "also while no node is left"
    smaller = nodes_of(255, gigabytes=102)
    found = choose(paper, smaller)
    assert (found.dp, found.ep, len(found.spares)) == (96, 32, 63)
    check(with_shape(compose("conf=deepseek_v3", "data.path=none", "cluster=ray"), found.shape))


def test_experts_and_shared_sequences_are_given_whole_groups_alone():
    """Of 8 ranks that share experts in groups of 4 and sequences in pairs: the ranks of a pair are in one group."""
    shapes = shapes_of("parallel.dp=4", "parallel.cp=2", "parallel.ep=4", "batch_size=8")
    assert (shapes.own.dp, shapes.own.ep, shapes.own.micro_batches) == (8, 4, 2)
    assert [(s.dp, s.ep, s.micro_batches) for s in shapes.smaller] == [
        (8, 2, 2), (8, 1, 2), (6, 2, 3), (6, 1, 3), (4, 4, 4), (4, 2, 4), (4, 1, 4), (2, 2, 8), (2, 1, 8)
    ]  # fmt: skip


def test_a_layout_may_take_all_of_a_device_and_the_plan_of_the_next_smaller_one_is_its_own(paper):
    def why(shape: StageShape, gigabytes: int) -> str | None:
        return paper.why_not(shape, nodes_of(255, gigabytes))

    assert why(StageShape(96, 32), 95) is None, "what it needs is there, to the byte"
    assert why(StageShape(96, 32), 94) == "it needs 95.0 GB per device, and a device has 94.0 GB"
    assert "101.0 GB" in why(StageShape(64, 32), 95)
    assert why(StageShape(64, 64), 87) is None, "the run itself is planned to need 88 GB, and runs: the plan is wrong"
    assert why(StageShape(96, 32), 87) == ("its memory per device is unknown: the plan is wrong for the current layout")


@pytest.mark.slow
def test_what_is_not_planned_keeps_its_ep(paper, tmp_path):
    write_config(compose("conf=deepseek_v3", "data.path=none", "cluster=ray"), str(tmp_path / "config.yaml"))
    fresh = Shapes(compose("conf=deepseek_v3", "data.path=none", "cluster=ray"), tmp_path)
    found = choose(fresh, nodes_of(255, gigabytes=141))
    assert (found.dp, found.ep, len(found.spares)) == (64, 64, 127)
    assert "no plan is available yet" in fresh.why_idle(found.shape, nodes_of(255, gigabytes=141))
    stale = {"config": "of another recipe", "layouts": [], "problem": None}
    (tmp_path / LAYOUTS_FILE).write_text(json.dumps(stale))
    assert not fresh.is_planned
    below = choose(paper, nodes_of(255, gigabytes=80))
    assert below.ep == 64, "a plan by which the run itself does not fit is not believed"


def test_shares_that_differ_are_taken_where_they_are_faster_and_zero_3_takes_none():
    shapes = shapes_of("parallel.dp=8", "batch_size=8")
    assert [(s.dp, s.micro_batches) for s in shapes.smaller] == [(4, 2), (5, 2), (6, 2), (7, 2), (3, 3), (2, 4), (1, 8)]
    equal = shapes_of("parallel.dp=8", "batch_size=8", "parallel.zero=3")
    nodes = [Node(f"id{i}", f"n{i}", f"10.0.0.{i}", 1) for i in range(7)]
    assert choose(equal, nodes[:3]).dp == 2 and choose(shapes, nodes[:3]).dp == 3
    assert "needs equal shares with parallel.zero=3" in equal.why_not(shapes.smaller[4], nodes)


def test_a_layout_that_no_shrinking_can_save_is_named_before_a_node_is_lost():
    world = World(nodes=2, words=("parallel.ep=2",))
    world.run(2)
    world.tell(m.LayoutsPlanned())
    (note,) = world.notes("limits")
    assert "the run waits for a replacement" in note.text
    assert "the smallest layout that may run, pp 1 x dp 2 (ep 2), takes 2 devices" in note.text
    roomy = World(nodes=3)
    roomy.run(2)
    roomy.tell(m.LayoutsPlanned())
    assert not roomy.notes("limits")


def test_a_run_grows_at_a_copy_in_memory_and_asks_for_no_checkpoint():
    world = World(nodes=3, steps=100, every=1000, copies=True)
    world.run(4)
    world.machines[1].linked = False
    world.run(12)
    assert world.starts[-1].placement.dp == 2
    world.machines[1].linked = True
    world.run(2)
    assert not world.notes("grow"), "there is no copy of this attempt yet"
    world.tell(m.CopyHeld(m.Age(world.starts[-1].attempt, world.step - 1)))
    world.run(3)
    stops = [action for action in world.actions if isinstance(action, m.StopRanks)]
    assert [stop.in_memory for stop in stops] == [True] and world.starts[-1].placement.dp == 3


def test_the_memory_of_gpus_is_read_where_the_driver_says_it(monkeypatch):
    said = "0, 81559\n1, [N/A]\nUnable to determine the device handle for GPU0000:3B:00.0: Unknown Error\n"
    monkeypatch.setattr(preflight.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=said))
    assert preflight._gpu_bytes() == [80743 << 20, 0]
