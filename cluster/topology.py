"""Which rank runs on which device: a pure function from nodes and degrees of parallelism to an ordered list.

The ranks of one expert-parallel group (`ep` contiguous ranks, see parallel/mesh.py) exchange tokens in every MoE layer,
so a group sits on as few nodes as possible, and inside one rack where it can. The next busiest neighbours are the
stages of a pipeline, so consecutive stages of the same data-parallel block get consecutive groups of devices:

    1. Sort nodes by rack, name, address. Cut them into seats: a seat holds one expert group. Where a group fits a
       node, a node has devices // ep seats; else a seat is ep / g nodes with g ranks each, g the largest divisor of
       ep that the nodes can hold, first inside racks, then from what the racks have left over.
    2. A block is one expert group of every stage: pp seats. A block has whole pipelines, so a lost device costs at
       most one block, and dp shrinks by ep. Seat i takes stage i % pp of block i // pp.
    3. Nodes without a rank are spares.

Every node holds the same number of ranks of an expert group, as the two-hop dispatcher requires.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from conf.errors import UserError


@dataclass(frozen=True)
class Node:
    """One machine that may run ranks."""

    id: str
    name: str
    """Label or host name, for people."""
    address: str
    """IP address that the other nodes reach it by."""
    devices: int
    """Ranks that it can hold: its GPUs, or an agreed number on CPU."""
    rack: str = ""


@dataclass(frozen=True)
class Seat:
    """The place of one rank."""

    rank: int
    node: Node
    local_rank: int
    """Index of the device on the node."""


@dataclass(frozen=True)
class Placement:
    """An ordered rank list."""

    pp: int
    dp: int
    ep: int
    seats: tuple[Seat, ...]
    """By rank."""
    spares: tuple[Node, ...]

    @property
    def world(self) -> int:
        return len(self.seats)

    def by_node(self) -> dict[str, list[Seat]]:
        """Seats of every node that has any, by node id, ordered by local rank."""
        found: dict[str, list[Seat]] = {}
        for seat in self.seats:
            found.setdefault(seat.node.id, []).append(seat)
        return {node: sorted(seats, key=lambda seat: seat.local_rank) for node, seats in found.items()}

    @property
    def nodes(self) -> list[Node]:
        """Nodes with ranks, each once."""
        return [seats[0].node for seats in self.by_node().values()]


def place(
    nodes: list[Node], pp: int, dp: int, ep: int, accept: Callable[[int], bool] = lambda dp: True
) -> Placement | None:
    """The placement with the largest dp that fits these nodes, at most the given one; None if nothing fits.

    dp stays a multiple of ep, so that every rank belongs to a whole pipeline and a whole expert group. accept: whether
    a smaller dp is allowed, as the batch must still divide among its ranks.
    """
    assert dp % ep == 0
    ordered = sorted(nodes, key=_position)
    best: tuple[int, list[list[tuple[Node, int]]], int] | None = None
    for inside in sorted((g for g in range(1, ep + 1) if ep % g == 0), reverse=True):
        seats = list(_seats(ordered, ep, inside))
        allowed = (size for size in range(min(dp, len(seats) // pp * ep), 0, -ep) if accept(size))
        size = next(allowed, 0)
        if size and (best is None or size > best[0]):
            best = size, seats, inside
    if best is None:
        return None
    size, seats, _ = best
    return _number(ordered, seats[: pp * size // ep], pp, size, ep)


def require(nodes: list[Node], pp: int, dp: int, ep: int) -> Placement:
    """The placement of exactly pp x dp ranks; UserError if the nodes cannot hold them."""
    found = place(nodes, pp, dp, ep)
    if found is not None and found.dp == dp:
        return found
    devices = sum(node.devices for node in nodes)
    fits = (
        f"parallel.dp={found.dp} fits"
        if found
        else f"one block needs {pp} x {ep} devices, each expert group on nodes that hold equal parts of it"
    )
    raise UserError(
        "parallel.pp x parallel.dp",
        f"{pp} x {dp}",
        f"needs {pp * dp} devices in whole expert groups of {ep}; {len(nodes)} nodes with {devices} devices are there",
        f"add nodes, or change the layout: {fits}",
    )


def _position(node: Node) -> tuple:
    return _natural(node.rack), _natural(node.name), _natural(node.address), node.id


def _natural(text: str) -> list[tuple[bool, int, str]]:
    """Sort key by which node10 comes after node9."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", text)]


def _seats(nodes: list[Node], ep: int, inside: int) -> Iterator[list[tuple[Node, int]]]:
    """Places of whole expert groups with `inside` ranks a node, as (node, first device) of each part, best ones first."""
    if inside == ep:
        for node in nodes:
            for first in range(0, node.devices - ep + 1, ep):
                yield [(node, first)]
        return
    parts, left, straddling = ep // inside, [], []
    racks: dict[str, list[Node]] = {}
    for node in nodes:
        if node.devices >= inside:
            racks.setdefault(node.rack, []).append(node)
    for rack in racks.values():
        whole = len(rack) // parts * parts
        for start in range(0, whole, parts):
            yield [(node, 0) for node in rack[start : start + parts]]
        left += rack[whole:]
    for start in range(0, len(left) // parts * parts, parts):
        straddling.append([(node, 0) for node in left[start : start + parts]])
    yield from straddling


def _number(nodes: list[Node], seats: list[list[tuple[Node, int]]], pp: int, dp: int, ep: int) -> Placement:
    """Give out rank numbers: rank = stage * dp + block * ep + index in the expert group."""
    placed: list[Seat] = []
    for index, seat in enumerate(seats):
        block, stage = divmod(index, pp)
        share = ep // len(seat)
        for part, (node, first) in enumerate(seat):
            start = stage * dp + block * ep + part * share
            placed += [Seat(start + i, node, first + i) for i in range(share)]
    used = {seat.node.id for seat in placed}
    spares = tuple(node for node in nodes if node.id not in used)
    return Placement(pp, dp, ep, tuple(sorted(placed, key=lambda seat: seat.rank)), spares)


def table(placement: Placement) -> str:
    """The placement for people: one line per node with ranks."""
    rows = [("node", "rack", "address", "stages", "expert groups", "ranks")]
    for seats in placement.by_node().values():
        node = seats[0].node
        ranks = [seat.rank for seat in seats]
        stages = sorted({rank // placement.dp for rank in ranks})
        groups = sorted({rank % placement.dp // placement.ep for rank in ranks})
        rows.append((node.name, node.rack or "-", node.address, _ranges(stages), _ranges(groups), _ranges(ranks)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = (
        f"{placement.world} ranks = pp {placement.pp} x dp {placement.dp} (ep {placement.ep}) on "
        f"{len(placement.nodes)} nodes, {len(placement.spares)} spare"
    )
    spares = ["spare: " + ", ".join(node.name for node in placement.spares)] if placement.spares else []
    return "\n".join([head, *lines, *spares])


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> 0-2,5"""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
