"""Ranks that keep their state in memory: any other number of ranks can read it, and after a failure the remaining state
is complete."""

import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cluster.driver.copies import Shelf, Shelves
from cluster.node.copy_store import SetId, Store, held
from conf.errors import UserError
from parallel.shard import Shard, whole
from tests.checkpoint.world import blank, random_tensors, same_bits, spread
from tests.ranks import run_ranks
from train.checkpoint.memory_copies import MemoryCopies
from train.checkpoint.read_shards import fill_shards


def shelves_of(folder: Path, stores: list[Store], resume: str | None = None, full_size: bool = True) -> Shelves:
    nodes = [Shelf(f"n{i}", str(s.folder), f"127.0.0.1:{s.port}", [i]) for i, s in enumerate(stores)]
    holding = [held(store.folder).get(resume, []) for store in stores]
    count = SetId.parse(resume).world if resume else 0
    holders = [[i for i, ranks in enumerate(holding) if rank in ranks] for rank in range(count)]
    return Shelves(nodes, resume, holders, full_size)


def open_stores(folder: Path, count: int) -> list[Store]:
    return [Store(folder / f"n{i}", "secret", "127.0.0.1", lambda: 1) for i in range(count)]


def sets(folder: Path, ranks: int) -> list[dict[str, Shard]]:
    rng = random.Random(3)
    return spread(rng, random_tensors(rng, 12), ranks)


def save_three_times(rank: int, shelves: Shelves, folder: Path) -> None:
    copies = MemoryCopies(shelves, "secret", rank=rank, world_size=3, attempt=1, timeout=10)
    shards = sets(folder, 3)[rank]
    assert copies.require_room(shards) is None
    for step in (5, 10, 15):
        copies.save(step, shards, {"step": step})
    copies._join()
    assert copies.poll() == []
    dist.barrier()


def test_two_ranks_read_what_three_kept_after_one_node_is_lost(tmp_path):
    stores = open_stores(tmp_path, 3)
    run_ranks(save_three_times, shelves_of(tmp_path, stores), tmp_path, world_size=3)
    names = [SetId(1, step, 3).name for step in (10, 15)]
    for i, store in enumerate(stores):
        assert held(store.folder) == dict.fromkeys(names, sorted({i, (i - 1) % 3}))
    stores.pop(1).close(remove=True)
    shelves = shelves_of(tmp_path, stores, resume=names[1])
    shelves.nodes[1].ranks[:] = [1]
    tensors = random_tensors(random.Random(3), 12)
    for rank, shards in enumerate(spread(random.Random(7), tensors, 2)):
        copies = MemoryCopies(shelves, "secret", rank=rank, world_size=2, attempt=2, timeout=10)
        wanted = blank(shards)
        meta = fill_shards(copies.manifest(), copies.files(), wanted)
        assert same_bits(wanted, shards) and meta["step"] == 15 and meta["world_size"] == 3
    for store in stores:
        store.close(remove=True)


def save_while_a_neighbour_is_gone(rank: int, shelves: Shelves, folder: Path) -> None:
    copies = MemoryCopies(shelves, "secret", rank=rank, world_size=2, attempt=1, timeout=5)
    shards = sets(folder, 2)[rank]
    copies.save(5, shards, {})
    copies._join()
    good = shelves.nodes[1].address
    if rank == 0:
        copies._next = Shelf("n1", "", "127.0.0.1:1", [1])
    copies.save(10, shards, {})
    copies._join()
    copies.save(15, shards, {})
    copies._join()
    warnings = copies.poll()
    assert ("Connection refused" in warnings[0]) if rank == 0 else ("step 10 in memory is incomplete" in warnings[0])
    if rank == 0:
        copies._next = Shelf("n1", "", good, [1])
    copies.save(20, shards, {})
    copies._join()
    dist.barrier()


def test_a_failed_save_leaves_the_whole_set_before_it(tmp_path):
    stores = open_stores(tmp_path, 2)
    run_ranks(save_while_a_neighbour_is_gone, shelves_of(tmp_path, stores), tmp_path)
    for store in stores:
        assert held(store.folder) == {SetId(1, 5, 2).name: [0, 1], SetId(1, 20, 2).name: [0, 1]}
        store.close(remove=True)


def ask_for_room(rank: int, shelves: Shelves, count: int) -> None:
    copies = MemoryCopies(shelves, "secret", rank=rank, world_size=2, attempt=1, timeout=5)
    huge = {"x": whole(torch.empty(count, dtype=torch.uint8, device="meta"))}
    if shelves.full_size:
        with pytest.raises(UserError, match=r"(?s)every_memory.*GB in .* of n0, where .* GB are free"):
            copies.require_room(huge)
    else:
        assert "has fewer nodes" in copies.require_room(huge)


@pytest.mark.parametrize("full_size", [True, False])
def test_copies_that_cannot_fit_are_refused_before_the_first(tmp_path, full_size):
    stores = open_stores(tmp_path, 2)
    run_ranks(ask_for_room, shelves_of(tmp_path, stores, full_size=full_size), 1 << 44)
    for store in stores:
        store.close(remove=True)
