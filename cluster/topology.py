"""Assigns ranks to devices: a pure function from nodes and degrees of parallelism to an ordered list.

The ranks of an expert group (`ep` consecutive ranks, see parallel/layout.py) exchange tokens in every MoE layer. So a
group uses few nodes, in one rack if possible. The steps:

    1. Sort nodes by rack, name and address. Divide their devices into slots of one expert group each, if possible
       inside one rack. A node has devices // ep slots. If a group does not fit on a node, a slot is ep / g nodes with
       g ranks each, for the largest divisor g of ep that the nodes can hold.
    2. A block is one expert group of every stage, in consecutive slots. Slot i is stage i % pp of block i // pp. A
       lost device costs at most one block (see cluster/driver/shapes.py).
    3. Nodes without a rank are spares.
    4. After a failure, ranks stay on their nodes, next to their copies in memory. A spare replaces each missing node,
       from the same rack if possible. A new placement (steps 1 to 3) is used if fewer of its groups span several
       racks than after these replacements.

All nodes of an expert group hold the same number of its ranks, as the two-hop dispatcher requires.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property

from conf.errors import UserError


@dataclass(frozen=True)
class Node:
    """One machine that may run ranks."""

    id: str
    name: str
    """Label or host name of the node, shown to users."""
    address: str
    """IP address at which the other nodes reach this node."""
    devices: int
    """Maximum number of ranks: the node's GPUs, or a configured number."""
    rack: str = ""
    device_bytes: int = 0
    """Memory of a device in bytes; 0 if unknown."""


@dataclass(frozen=True)
class StageShape:
    """The shape of a pipeline stage. ep: number of ranks that share the experts."""

    dp: int
    """Number of ranks of a stage: parallel.dp x parallel.cp."""
    ep: int
    micro_batches: int = 0
    """Number of micro-batches that the busiest rank runs in a step."""


@dataclass(frozen=True)
class Seat:
    """The node and device of one rank."""

    rank: int
    node: Node
    local_rank: int
    """Index of the device on the node."""


@dataclass(frozen=True)
class Placement:
    """The node and device of every rank of an attempt."""

    pp: int
    shape: StageShape
    seats: tuple[Seat, ...]
    """The node and device of every rank, in rank order."""
    spares: tuple[Node, ...]

    @property
    def dp(self) -> int:
        return self.shape.dp

    @property
    def ep(self) -> int:
        return self.shape.ep

    @property
    def world(self) -> int:
        return len(self.seats)

    @cached_property
    def by_node(self) -> dict[str, list[Seat]]:
        """Return the seats (the node and device of each rank) by node id, in the order of local ranks."""
        found: dict[str, list[Seat]] = {}
        for seat in self.seats:
            found.setdefault(seat.node.id, []).append(seat)
        return {node: sorted(seats, key=lambda seat: seat.local_rank) for node, seats in found.items()}

    @property
    def nodes(self) -> list[Node]:
        """Return the nodes that have ranks, each node once."""
        return [seats[0].node for seats in self.by_node.values()]


def place(
    nodes: list[Node],
    pp: int,
    shapes: Iterable[StageShape],
    allowed: Callable[[StageShape], bool] = lambda shape: True,
    near: Placement | None = None,
) -> Placement | None:
    """Return the placement of the first allowed shape that fits the nodes, or None.

    near: an earlier placement. With the same shape, each rank stays on its node.
    """
    ordered = sorted(nodes, key=_position)
    seats_of = cache(lambda ep, inside: list(_seats(ordered, ep, inside)))
    for shape in shapes:
        assert shape.dp % shape.ep == 0
        wanted = pp * shape.dp // shape.ep
        rooms = (seats_of(shape.ep, inside) for inside in _parts(shape.ep))
        seats = next((seats for seats in rooms if len(seats) >= wanted), None)
        if seats is None or not allowed(shape):
            continue
        fresh = _number(ordered, seats[:wanted], pp, shape)
        kept = None if near is None or (near.pp, near.shape) != (pp, shape) else _replace_missing(ordered, near)
        return kept if kept is not None and _straddling(kept) <= _straddling(fresh) else fresh
    return None


def count_group_places(nodes: Iterable[Node], ep: int) -> int:
    """Return how many expert groups of `ep` ranks fit the nodes."""
    ordered = sorted(nodes, key=_position)
    return max(len(list(_seats(ordered, ep, inside))) for inside in _parts(ep))


def require(nodes: list[Node], pp: int, dp: int, ep: int) -> Placement:
    """Return a placement of exactly pp x dp ranks. Raises UserError if it does not fit."""
    found = place(nodes, pp, [StageShape(size, ep) for size in range(dp, 0, -ep)])
    if found is not None and found.dp == dp:
        return found
    devices = sum(node.devices for node in nodes)
    fits = (
        f"parallel.dp={found.dp} fits"
        if found
        else f"one block needs {pp} x {ep} devices, with each expert group divided equally among its nodes"
    )
    raise UserError(
        "parallel.pp x parallel.dp",
        f"{pp} x {dp}",
        f"needs {pp * dp} devices in whole expert groups of {ep}; {len(nodes)} nodes with {devices} devices are available",
        f"add nodes, or change the layout: {fits}",
    )


def _replace_missing(ordered: list[Node], near: Placement) -> Placement | None:
    """Return a copy of a placement in which a spare node replaces each missing node; None if too few spares fit."""
    index = {node.id: place for place, node in enumerate(ordered)}
    used = near.by_node
    spares = [node for node in ordered if node.id not in used]
    now: dict[str, Node] = {}
    for id, seats in used.items():
        needed, old = 1 + max(seat.local_rank for seat in seats), seats[0].node
        if id in index and ordered[index[id]].devices >= needed:
            now[id] = ordered[index[id]]
            continue
        fitting = [node for node in spares if node.devices >= needed]
        if not fitting:
            return None
        now[id] = next((node for node in fitting if node.rack == old.rack), fitting[0])
        spares.remove(now[id])
    seats = tuple(Seat(seat.rank, now[seat.node.id], seat.local_rank) for seat in near.seats)
    return Placement(near.pp, near.shape, seats, tuple(spares))


def _straddling(placement: Placement) -> int:
    """Return how many expert groups span several racks."""
    racks: dict[int, set[str]] = {}
    for seat in placement.seats:
        racks.setdefault(seat.rank // placement.ep, set()).add(seat.node.rack)
    return sum(len(each) > 1 for each in racks.values())


def _position(node: Node) -> tuple:
    return _natural(node.rack), _natural(node.name), _natural(node.address), node.id


@cache
def _natural(text: str) -> list[tuple[bool, int, str]]:
    """Return a sort key that puts node9 before node10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", text)]


_Seats = list[list[tuple[Node, int]]]


def _parts(ep: int) -> Iterator[int]:
    """Yield possible numbers of an expert group's ranks per node, in descending order."""
    return (inside for inside in range(ep, 0, -1) if ep % inside == 0)


def _seats(nodes: list[Node], ep: int, inside: int) -> Iterator[list[tuple[Node, int]]]:
    """Yield the slots for expert groups, the best first. A slot is a list of (node, first device). inside: ranks per
    node.
    """
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


def _number(nodes: list[Node], seats: _Seats, pp: int, shape: StageShape) -> Placement:
    """Assign ranks to devices: rank = stage * dp + block * ep + index in the group."""
    dp, ep = shape.dp, shape.ep
    placed: list[Seat] = []
    for index, seat in enumerate(seats):
        block, stage = divmod(index, pp)
        share = ep // len(seat)
        for part, (node, first) in enumerate(seat):
            start = stage * dp + block * ep + part * share
            placed += [Seat(start + i, node, first + i) for i in range(share)]
    used = {seat.node.id for seat in placed}
    spares = tuple(node for node in nodes if node.id not in used)
    return Placement(pp, shape, tuple(sorted(placed, key=lambda seat: seat.rank)), spares)


def placement_table(placement: Placement) -> str:
    """Return the placement as a table, with one line per node."""
    rows = [("node", "rack", "address", "stages", "expert groups", "ranks")]
    for seats in placement.by_node.values():
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
    """Return numbers as text with ranges: [0, 1, 2, 5] -> 0-2,5"""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
