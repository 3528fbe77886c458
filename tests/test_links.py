"""What ranks learn of their links before a run: with gloo on CPUs, as NCCL is asked on GPUs."""

import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from conf.dispatches import DISPATCHES
from conf.schema import Rate
from parallel import links
from parallel.exchange import gather
from parallel.layout import Layout
from parallel.links import LinkRate, notes_on_links, rounds_of_pairs, try_links
from parallel.mesh import build_mesh
from tests.ranks import run_ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize(("world", "local"), [(1, 1), (2, 2), (2, 1), (3, 3), (4, 2), (8, 4), (9, 3), (10, 2), (16, 8)])
def test_every_neighbour_is_tried_once_and_no_rank_twice_at_a_time(world, local):
    rounds = list(rounds_of_pairs(world, local))
    for _, pairs in rounds:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks)) and all(a != b for a, b in pairs)
    tried = {
        kind: {frozenset(pair) for of, pairs in rounds if of == kind for pair in pairs} for kind in ("inside", "across")
    }
    for kind, members in (("inside", local), ("across", world // local)):
        links_of_a_ring = members if members > 2 else members - 1
        assert len(tried[kind]) == links_of_a_ring * world // members
        assert sum(len(pairs) for of, pairs in rounds if of == kind) == len(tried[kind])
    assert all((a // local == b // local) for a, b in map(sorted, tried["inside"]))
    assert all((a % local == b % local) for a, b in map(sorted, tried["across"]))


def _measured(rank: int, dispatch: str) -> None:
    mesh = build_mesh(Layout(pp=1, dp=4, ep=4, ranks_per_node=2))
    names, found = try_links(mesh, DISPATCHES[dispatch], 2, CPU, size=1 << 14)
    assert len(names) == 4 and f"cpu (rank {rank})" in names[rank]
    kinds = [(one.kind, one.ranks) for one in found]
    assert {
        ("inside", (0, 1)),
        ("inside", (2, 3)),
        ("across", (0, 2)),
        ("across", (1, 3)),
        ("all-reduce", (0, 1, 2, 3)),
    } <= set(kinds)
    hops = {ranks for kind, ranks in kinds if kind == "all-to-all"}
    assert hops == ({(0, 1), (2, 3), (0, 2), (1, 3)} if dispatch == "node_limited" else {(0, 1, 2, 3)})
    assert all(one.bytes_per_second > 0 for one in found)


@pytest.mark.parametrize("dispatch", ["flat", "node_limited"])
def test_all_ranks_learn_every_rate(dispatch):
    run_ranks(_measured, dispatch, world_size=4)


def _wrong(rank: int) -> None:
    """Rank 1 sends other bytes than it should."""
    mesh = build_mesh(Layout(pp=1, dp=2, ep=1, ranks_per_node=1))
    if rank == 1:
        links.torch = SimpleNamespace(**vars(torch) | {"full": lambda *given, **named: torch.full(*given, **named) + 1})
        with suppress(RuntimeError):  # whichever rank ends first
            try_links(mesh, DISPATCHES["flat"], 1, CPU, size=1 << 14)
    else:
        with pytest.raises(
            RuntimeError, match=r"a corrupt link: .*\(rank 0\) receives other bytes than .*\(rank 1\) sends"
        ):
            try_links(mesh, DISPATCHES["flat"], 1, CPU, size=1 << 14)


def test_a_link_that_carries_other_bytes_is_named():
    run_ranks(_wrong, world_size=2)


def _dead(rank: int) -> None:
    """Rank 1 tells its name, and then sends nothing."""
    mesh = build_mesh(Layout(pp=1, dp=2, ep=1, ranks_per_node=1))
    if rank == 1:
        gather(["host-1 cpu (rank 1)", 1])
        time.sleep(8)
    else:
        with pytest.raises(RuntimeError, match=r"a dead link: .*\(rank 0\) and host-1 cpu \(rank 1\) exchange no data"):
            try_links(mesh, DISPATCHES["flat"], 1, CPU, size=1 << 14, patience=2.0)


@pytest.mark.slow
def test_a_dead_link_is_named_by_both_ends():
    run_ranks(_dead, world_size=2)


def test_a_slow_link_is_named_beside_the_others_and_the_hardware_file():
    names = [f"host-{rank // 2} cuda:{rank % 2} (rank {rank})" for rank in range(4)]
    found = [LinkRate("inside", (0, 1), 300e9), LinkRate("inside", (2, 3), 20e9), LinkRate("across", (0, 2), 45e9)]
    rates = {"inside": Rate(bandwidth=301e9), "across": Rate(bandwidth=44.6e9), "memory": Rate(bandwidth=3e12)}
    said, slow = notes_on_links(names, found, rates)
    assert said == (
        "links between ranks: inside 20 to 300 GB/s (2; the hardware file has 301); across 45 to 45 GB/s (1; the hardware file has 44.6)"
    )
    assert slow == "a slow link: inside of host-1 cuda:0 (rank 2) and host-1 cuda:1 (rank 3) reaches 20 GB/s"
    assert len(notes_on_links(names, found, {})) == 2  # by the median of its kind
    assert notes_on_links(names, [], rates) == []
    many = [LinkRate("across", (0, 2), 1e9)] * 9
    assert (
        notes_on_links(names, many, rates)[-1] == "4 more links are slow"
        and len(notes_on_links(names, many, rates)) == 7
    )
