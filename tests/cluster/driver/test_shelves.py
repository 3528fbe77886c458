"""Where the driver places the copies of a run: rings of nodes, the newest complete set, and the run that a set belongs
to."""

import pytest

from cluster.driver.copies import Copies, Shelf, Shelves
from cluster.topology import Node, StageShape, place

NODES = {f"id{i}": Node(f"id{i}", f"n{i}", f"10.0.0.{i}", 2) for i in range(4)}
PLACEMENT = place(list(NODES.values())[:2], 1, [StageShape(4, 1)])
OLD, NEW = "attempt_00003.step_00000020.world_4", "attempt_00004.step_00000010.world_4"


@pytest.fixture
def copies(tmp_path) -> Copies:
    found = Copies(tmp_path, "/dev/shm", first=4)
    for number, node in enumerate(NODES):
        found.note_port(node, 7000 + number)
    found.take("id0", {OLD: [0, 1, 2, 3], NEW: [0, 1]})
    found.take("id2", {OLD: [0, 1], NEW: [0, 1, 2, 3]})
    return found


@pytest.mark.parametrize(
    ("held", "following"), [([1, 1, 0], [1, 0]), ([1, 1, 1, 0, 0], [1, 2, 0]), ([1, 0, 0], [None])]
)
def test_the_next_of_a_node_is_the_one_behind_it_that_has_ranks(held, following):
    shelves = Shelves([Shelf(f"n{i}", "", "", [i] * ranks) for i, ranks in enumerate(held)], None, [], True)
    assert [shelves.next(index) for index in range(len(following))] == following
    assert [shelves.home(rank) for rank in range(len(following))] == list(range(len(following)))


def test_nodes_with_ranks_come_first_and_one_without_a_store_is_left_out(copies):
    copies.forget("id3")
    found = copies.shelves(PLACEMENT, NODES, True, auto=True)
    assert [(shelf.name, shelf.address, shelf.ranks) for shelf in found.nodes] == [
        ("n0", "10.0.0.0:7000", [0, 1]),
        ("n1", "10.0.0.1:7001", [2, 3]),
        ("n2", "10.0.0.2:7002", []),
    ]
    assert found.resume == NEW and found.holders == [[0, 2], [0, 2], [2], [2]]


def test_a_run_that_does_not_resume_by_itself_goes_on_from_its_own_copies_alone(copies):
    """The fourth attempt is the first of this launch."""
    assert copies.shelves(PLACEMENT, NODES, True, auto=False).resume == NEW
    copies.forget("id2")  # with it goes what it alone had
    left = {id: node for id, node in NODES.items() if id != "id2"}
    assert copies.newest(NODES).name == OLD
    assert copies.shelves(PLACEMENT, left, True, auto=True).resume == OLD
    assert copies.shelves(PLACEMENT, left, True, auto=False).resume is None
