"""Tests the links between GPU ranks before data preparation, with the transfers of a step; names slow or dead links.

Each rank exchanges rows with one other rank at a time: with every neighbour on its node, then with the rank of the same
index on the neighbouring nodes. So a time belongs to one link, and all links of a kind are tested at once, as a step
uses them. Then the run's own groups run an all-reduce and an all-to-all. Received bytes are checked. A transfer that
does not end within LINK_PATIENCE raises an error that names both ends.
"""

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from conf.dispatches import DispatchFacts
from conf.schema import Rate
from parallel.exchange import gather
from parallel.mesh import Mesh

TRIED_BYTES = 64 << 20
"""Size of a message: large enough that a GPU's link reaches its full rate."""
LINK_ROUNDS = 5
"""Timed exchanges per link or group, after one that opens the connection."""
LINK_PATIENCE = 60.0
"""Seconds allowed for one exchange; opening connections takes some of them."""
SLOW_LINK = 0.5
"""Share of the expected rate, or of the median of all links of its kind, below which a link is slow."""
NAMED_LINKS = 5
"""Slow links that are named; the rest are counted."""

Pair = tuple[int, int]


@dataclass(frozen=True)
class LinkRate:
    """Measured rate of one link or one group."""

    kind: str
    """inside (a node), across (nodes), all-reduce or all-to-all."""
    ranks: tuple[int, ...]
    bytes_per_second: float
    """In one direction, for each rank."""


def rounds_of_pairs(world: int, local: int) -> Iterator[tuple[str, list[Pair]]]:
    """Yield rounds in which every rank has at most one partner. local: ranks per node, with consecutive numbers."""
    nodes = world // local
    for matching in _matchings(local):
        yield "inside", [(node * local + a, node * local + b) for node in range(nodes) for a, b in matching]
    for matching in _matchings(nodes):
        yield "across", [(a * local + place, b * local + place) for a, b in matching for place in range(local)]


def _matchings(count: int) -> Iterator[list[Pair]]:
    """Yield the links of a ring, split into two or three rounds."""
    ring = [(one, (one + 1) % count) for one in range(count if count > 2 else count - 1)]
    for part in (ring[0 : count - count % 2 : 2], ring[1::2], ring[count - 1 :] if count % 2 and count > 2 else []):
        if part:
            yield part


def try_links(
    mesh: Mesh,
    facts: DispatchFacts,
    local: int,
    device: torch.device,
    size: int = TRIED_BYTES,
    patience: float = LINK_PATIENCE,
) -> tuple[list[str], list[LinkRate]]:
    """Return the names of all ranks by host and device, and the rates of each link and of this layout's groups.
    Collective over all ranks.

    facts: of the run's dispatch. local: ranks per node. Raises RuntimeError for a link on which nothing or wrong data
    arrives.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    everyone = gather([f"{socket.gethostname()} {device} (rank {rank})", local])
    names, sizes = ([one[part] for one in everyone] for part in range(2))
    local = (
        local if len(set(sizes)) == 1 and world % local == 0 else 1
    )  # nodes of several sizes: every link counts as one between nodes
    sent = torch.full((size,), rank & 0xFF, dtype=torch.uint8, device=device)
    came, found = torch.empty_like(sent), []

    def exchange(other: int) -> None:
        transfers = [dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, came, other)]
        _wait(dist.batch_isend_irecv(transfers), device, patience, f"{names[rank]} and {names[other]}")

    for kind, pairs in rounds_of_pairs(world, local):
        mine = next((pair for pair in pairs if rank in pair), None)
        if mine is not None:
            other = sum(mine) - rank
            rate = size / _seconds(lambda other=other: exchange(other))
            if is_other(came, other & 0xFF):
                raise RuntimeError(f"a corrupt link: {names[rank]} receives other bytes than {names[other]} sends")
            found += [LinkRate(kind, mine, rate)] * (rank == mine[0])
        gather(None)  # ranks without a partner wait, so that no other round uses the links
    hops = [mesh.intra_group, mesh.inter_group] if facts.by_nodes else [] if facts.needs_gpu else [mesh.ep_group]
    for kind, group in (("all-reduce", mesh.stage_group), *(("all-to-all", hop) for hop in hops)):
        ranks = dist.get_process_group_ranks(group)
        who = f"the ranks of a group from {names[ranks[0]]} to {names[ranks[-1]]}"
        part = sent[: size // len(ranks) * len(ranks)]

        def together(kind: str = kind, group: dist.ProcessGroup = group, who: str = who, part: Tensor = part) -> None:
            if kind == "all-reduce":
                work = dist.all_reduce(part, dist.ReduceOp.MAX, group=group, async_op=True)
            else:
                work = dist.all_to_all_single(came[: len(part)], part, group=group, async_op=True)
            assert work is not None, "every rank is in its group"
            _wait([work], device, patience, who)

        if len(ranks) > 1:
            moved = size * (len(ranks) - 1) / len(ranks) * (2 if kind == "all-reduce" else 1)
            found += [LinkRate(kind, tuple(ranks), moved / _seconds(together))] * (rank == ranks[0])
    rates = gather([[one.kind, one.ranks, one.bytes_per_second] for one in found])
    return names, [LinkRate(kind, tuple(ranks), rate) for each in rates for kind, ranks, rate in each]


def is_other(came: Tensor, expected: int) -> bool:
    """Whether any byte differs from the expected value. Waits for the device."""
    return bool(came.ne(expected).any())


def notes_on_links(names: list[str], found: list[LinkRate], expected: dict[str, Rate]) -> list[str]:
    """Return notes for the user: the rates by kind beside those of the hardware file, and the ends of every slow
    link.
    """
    said, slow = [], []
    for kind in dict.fromkeys(one.kind for one in found):
        rates = sorted(one.bytes_per_second for one in found if one.kind == kind)
        median, planned = rates[len(rates) // 2], expected[kind].bandwidth if kind in expected else 0.0
        beside = f"; the hardware file has {planned / 1e9:.3g}" if planned else ""
        said.append(f"{kind} {rates[0] / 1e9:.3g} to {rates[-1] / 1e9:.3g} GB/s ({len(rates)}{beside})")
        floor = SLOW_LINK * max(median, planned)
        slow += [one for one in found if one.kind == kind and one.bytes_per_second < floor]
    notes = [f"links between ranks: {'; '.join(said)}"] if said else []
    for one in slow[:NAMED_LINKS]:
        ends = " and ".join(names[rank] for rank in (one.ranks[0], one.ranks[-1]))
        notes.append(f"a slow link: {one.kind} of {ends} reaches {one.bytes_per_second / 1e9:.3g} GB/s")
    if len(slow) > NAMED_LINKS:
        notes.append(f"{len(slow) - NAMED_LINKS} more links are slow")
    return notes


def _seconds(exchange: Callable[[], None]) -> float:
    """Return the minimum time of several exchanges, each waited for."""
    exchange()
    best = float("inf")
    for _ in range(LINK_ROUNDS):
        began = time.perf_counter()
        exchange()
        best = min(best, time.perf_counter() - began)
    return best


def _wait(works: list[dist.Work], device: torch.device, patience: float, who: str) -> None:
    """Wait until all works are complete, at most `patience` seconds: NCCL's own wait blocks the device, not the
    host.
    """
    deadline = time.monotonic() + patience
    try:
        if device.type == "cpu":
            for work in works:
                work.wait(timedelta(seconds=patience))
            return
        while not all(work.is_completed() for work in works):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no end within {patience:g} s")
        for work in works:
            work.wait()
    except (RuntimeError, TimeoutError) as error:
        raise RuntimeError(f"a dead link: {who} exchange no data ({error})") from error
