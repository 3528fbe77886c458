"""The driver's record of the in-memory copies (cluster/node/copy_store.py): which node holds which copies.

Before an attempt starts, the driver writes attempts/NUMBER.memory.json for its ranks. This file contains:

    - where each node stores copies, and which other node stores the second copy of the node's parts
    - the newest set of copies (all from one step) that is complete on the answering nodes, if there is one

Rank 0 resumes from this set or from the newest checkpoint on disk (train/loop/resume.py).
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from cluster.node.copy_store import SetId, folder_name
from cluster.topology import Node, Placement
from conf.disk import naming
from conf.files import atomic_write_text, read_plain


@dataclass(frozen=True)
class Shelf:
    """The place where one node stores its copies."""

    name: str
    """The node's name, for messages."""
    folder: str
    address: str
    """HOST:PORT at which the node's agent serves the copies."""
    ranks: list[int]
    """Ranks of this attempt that run on the node."""


@dataclass(frozen=True)
class Shelves:
    """What the ranks of one attempt know about the in-memory copies."""

    nodes: list[Shelf]
    """The nodes that store copies, nodes with ranks first. Each node with ranks also stores the second copy of the node
    before it; the first node stores that of the last node with ranks.
    """
    resume: str | None
    """Name of the newest complete set of copies, or None."""
    holders: list[list[int]]
    """For every rank that wrote the set of copies `resume`: the nodes that hold this rank's part of the state, as
    indexes in `nodes`.
    """
    full_size: bool
    """Whether the attempt runs the full layout, whose copies must fit into memory."""

    @staticmethod
    def read(path: Path) -> "Shelves":
        text = json.loads(path.read_text())
        return Shelves(**(text | {"nodes": [Shelf(**node) for node in text["nodes"]]}))

    def home(self, rank: int) -> int:
        """Return the index of the node on which a rank runs."""
        return next(index for index, node in enumerate(self.nodes) if rank in node.ranks)

    def next(self, index: int) -> int | None:
        """Return the index of the node that stores node `index`'s second copy, or None."""
        count = sum(bool(node.ranks) for node in self.nodes)
        return (index + 1) % count if count > 1 else None


class Copies:
    """All in-memory copies that the agents of a run hold.

    folder: run folder. base: folder for copies on every node. first: this launch's first attempt.
    """

    def __init__(self, folder: Path, base: str, first: int):
        self._folder, self.base, self._first = folder, base, first
        self.token = secrets.token_hex(32)
        self._run = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
        self._ports: dict[str, int] = {}
        self._held: dict[str, dict[str, list[int]]] = {}
        """Ranks whose part of the state is on a node, by node id and name of the set of copies."""

    @cached_property
    def _id(self) -> str:
        """Random id of the run, stored in the run folder. No other process can guess it and create the memory folder
        first.
        """
        path = self._folder / "attempts" / "memory_id"
        path.parent.mkdir(exist_ok=True)
        found = read_plain(path).decode() if path.exists() else ""
        if not re.fullmatch("[0-9a-f]{8}", found):  # the id becomes part of a path, so invalid text is replaced
            found = secrets.token_hex(4)
            with naming(path):
                atomic_write_text(path, found, mode=0o600)
        elif path.stat().st_mode & 0o077:  # earlier versions wrote it with other permissions
            path.chmod(0o600)
        return found

    def folder_on(self, node: Node) -> str:
        return str(Path(self.base) / folder_name(self._run, self._id, node.name))

    def note_port(self, node: str, port: int) -> None:
        """Record the port on which the store of this node listens."""
        self._ports[node] = port

    def take(self, node: str, held: dict[str, list[int]]) -> None:
        """Record the copies that a node's agent reports."""
        self._held[node] = held

    def forget(self, node: str) -> None:
        """Remove the record of a lost node."""
        self._ports.pop(node, None)
        self._held.pop(node, None)

    def newest(self, nodes: Iterable[str]) -> SetId | None:
        """Return the newest set of copies that is complete on these nodes, or None."""
        ranks: dict[str, set[int]] = {}
        for node in nodes:
            for name, held in self._held.get(node, {}).items():
                ranks.setdefault(name, set()).update(held)
        found = [(SetId.parse(name), held) for name, held in ranks.items()]
        return max((id for id, held in found if id and len(held) == id.world), default=None)

    def shelves(self, placement: Placement, nodes: dict[str, Node], full_size: bool, auto: bool) -> Shelves:
        """Return the locations of all copies for the ranks of an attempt.

        nodes: all nodes that answer, by id. auto: whether the attempt may resume from an earlier launch's copies.
        """
        ranks = {id: [seat.rank for seat in seats] for id, seats in placement.by_node.items()}
        ids = [*ranks, *(id for id in nodes if id not in ranks and id in self._ports)]
        shelves = [
            Shelf(
                nodes[id].name, self.folder_on(nodes[id]), f"{nodes[id].address}:{self._ports[id]}", ranks.get(id, [])
            )
            for id in ids
        ]
        found = self.newest(ids)
        if found is None or not (auto or found.attempt >= self._first):
            return Shelves(shelves, None, [], full_size)
        holders: list[list[int]] = [[] for _ in range(found.world)]
        for index, id in enumerate(ids):
            for rank in self._held.get(id, {}).get(found.name, []):
                holders[rank].append(index)
        return Shelves(shelves, found.name, holders, full_size)

    def write(self, number: int, shelves: Shelves) -> dict[str, str]:
        """Write `shelves` to a file for the ranks. Returns environment variables: the file's path and the stores'
        token.
        """
        path = self._folder / "attempts" / f"{number:05d}.memory.json"
        with naming(path):
            path.write_text(json.dumps(asdict(shelves)))
        return {"SLUICE_MEMORY": str(path), "SLUICE_MEMORY_TOKEN": self.token}


def given_shelves() -> tuple[Shelves, str] | None:
    """Return the locations of all copies and the stores' token, or None without copies.

    Call only once: it removes the token from the environment.
    """
    if "SLUICE_MEMORY" not in os.environ:
        return None
    return Shelves.read(Path(os.environ["SLUICE_MEMORY"])), os.environ.pop("SLUICE_MEMORY_TOKEN")
