"""Tests the links between GPU ranks before data preparation, and names slow or dead links.

Each rank exchanges data with its neighbours on the node, then with the ranks at the same position on neighbouring
nodes, with one rank at a time. The received bytes are checked. All links of a kind run at once, as in a step. Then
the run's groups run an all-reduce and an all-to-all.
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
"""Bytes of a message, enough for a GPU's link to reach its full rate."""
LINK_ROUNDS = 5
"""Timed exchanges per link or group, after an untimed one."""
LINK_PATIENCE = 60.0
"""Maximum seconds of an exchange, including the opening of a connection."""
SLOW_LINK = 0.5
"""A link is slow below this fraction of the expected rate, or of the median rate of all links of the same kind."""
NAMED_LINKS = 5
"""Maximum number of slow links that are named, not only counted."""

Pair = tuple[int, int]


@dataclass(frozen=True)
class LinkRate:
    """Measured rate of one link or one group."""

    kind: str
    """Kind of link or group: inside (a node), across (nodes), all-reduce, all-to-all."""
    ranks: tuple[int, ...]
    bytes_per_second: float
    """Bytes per second of each rank in one direction."""


def rounds_of_pairs(world: int, local: int) -> Iterator[tuple[str, list[Pair]]]:
    """Yield the rounds of the test: the kind of link and disjoint pairs of ranks.

    local: number of consecutive ranks per node.
    """
    nodes = world // local
    for matching in _matchings(local):
        yield "inside", [(node * local + a, node * local + b) for node in range(nodes) for a, b in matching]
    for matching in _matchings(nodes):
        yield "across", [(a * local + place, b * local + place) for a, b in matching for place in range(local)]


def _matchings(count: int) -> Iterator[list[Pair]]:
    """Yield pairs of neighbours in a ring of `count` members, in two or three rounds."""
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
    """Measure all links. Returns the names of all ranks (host and device) and the rates of links and groups.

    Collective over all ranks. local: ranks per node. Raises RuntimeError if a link delivers no data or wrong data.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    everyone = gather([f"{socket.gethostname()} {device} (rank {rank})", local])
    names, sizes = ([one[part] for one in everyone] for part in range(2))
    local = (
        local if len(set(sizes)) == 1 and world % local == 0 else 1
    )  # with different numbers of ranks per node, every link counts as across
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
        # Ranks without a partner wait here, so that two rounds never share a link.
        gather(None)
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
    """Whether any byte of `came` is wrong. Waits for the device."""
    return bool(came.ne(expected).any())


def notes_on_links(names: list[str], found: list[LinkRate], expected: dict[str, Rate]) -> list[str]:
    """Return notes for the user: rates compared with the hardware file, and the ranks at both ends of slow links."""
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
    """Return the seconds of the fastest of LINK_ROUNDS runs. `exchange` must wait for its transfers."""
    exchange()
    best = float("inf")
    for _ in range(LINK_ROUNDS):
        began = time.perf_counter()
        exchange()
        best = min(best, time.perf_counter() - began)
    return best


def _wait(works: list[dist.Work], device: torch.device, patience: float, who: str) -> None:
    """Wait on the host, at most `patience` seconds. NCCL's own wait blocks only the device."""
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
