"""Writes and reads a rank's copies in memory (see cluster/node/copy_store.py).

A thread writes each copy to a file in the memory of the rank's node and of the next node. The files of all ranks for
one step are a set. Nodes keep the newest complete set until a newer set is complete. A failed save becomes a warning in
`poll`.
"""

import json
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.driver.copies import Shelves
from cluster.node.copy_store import Peer, SetId, folder_bytes, prune
from cluster.run_files import data_name, index_name
from conf.errors import UserError
from conf.files import atomic_write_json
from parallel.exchange import gather
from parallel.shard import Shard
from train.checkpoint.checkpointer import SAVE_PATIENCE
from train.checkpoint.manifest import CheckpointDamaged, Manifest, manifest_of
from train.checkpoint.read_shards import FolderFiles, ReadSpan, merge_indexes
from train.checkpoint.staging import StagingBuffers, lay_out_shards

SETS = 2
"""Maximum number of sets of copies on a node."""


class MemoryCopies:
    """Copies one rank's state to the memory of nodes, during one attempt."""

    def __init__(self, shelves: Shelves, token: str, *, rank: int, world_size: int, attempt: int, timeout: float):
        """token: authenticates this rank. timeout: maximum wait for a node, in seconds."""
        self.shelves, self.token, self.rank, self.world_size = shelves, token, rank, world_size
        self.attempt, self.timeout = attempt, timeout
        home = shelves.home(rank)
        following = shelves.next(home)
        self._folder = Path(shelves.nodes[home].folder)
        self._next = None if following is None else shelves.nodes[following]
        self._resumed = ""
        """Name of the set of copies that this attempt resumed from."""
        self._stored = -1
        """Newest step that this rank has stored on its node and on the next node; -1: none."""
        self._asked = -1
        """Step of the last requested save; -1 if there is none."""
        self._stage: StagingBuffers | None = None
        self._thread: threading.Thread | None = None
        self._began = 0.0
        self._warnings: deque[str] = deque()  # the saving thread appends, and the training loop reads

    def save(self, step: int, shards: dict[str, Shard], meta: dict[str, Any]) -> float:
        """Copy the state after `step`. Returns the blocked seconds. Collective."""
        began = time.perf_counter()
        ready = self._join()
        kept = self._agree_on_kept()
        if not ready:
            self._warnings.append(f"copy of step {step} in memory skipped: the previous copy is not complete yet")
            return time.perf_counter() - began
        self._asked = step
        if self._stage is None:
            self._stage = StagingBuffers(pinned=any(shard.local.is_cuda for shard in shards.values()))
        self._stage.copy(shards)
        arguments = (self._stage, SetId(self.attempt, step, self.world_size), kept, json.loads(json.dumps(meta)))
        self._thread, self._began = (
            threading.Thread(target=self._run, args=arguments, name=f"copy-{step}", daemon=True),
            began,
        )
        self._thread.start()
        return time.perf_counter() - began

    def save_and_wait(self, step: int, shards: dict[str, Shard], meta: dict[str, Any]) -> bool:
        """Copy the final state. Returns whether all ranks have succeeded. Collective."""
        if self._asked != step:
            self.save(step, shards, meta)
        self._join()
        return self._oldest_stored() == step

    def poll(self) -> list[str]:
        """Returns the warnings since the last call. Never waits."""
        return [self._warnings.popleft() for _ in range(len(self._warnings))]

    def _join(self) -> bool:
        """Wait for the previous save. Returns whether its thread has ended."""
        if self._thread is not None:
            self._thread.join(max(0.0, self._began + SAVE_PATIENCE * self.timeout - time.perf_counter()))
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    def _agree_on_kept(self) -> str:
        """Returns the name of the set of copies to keep; empty if there is none."""
        step = self._oldest_stored()
        if step < self._asked == self._stored:
            self._warnings.append(
                f"copy of step {self._asked} in memory is incomplete; see the logs of the other ranks"
            )
        return SetId(self.attempt, step, self.world_size).name if step >= 0 else self._resumed

    def _oldest_stored(self) -> int:
        """Returns the smallest `_stored` of all ranks: each rank has stored this step or a newer one. Collective."""
        stored = torch.tensor([self._stored])
        dist.all_reduce(stored, op=dist.ReduceOp.MIN)
        return int(stored)

    def _run(self, stage: StagingBuffers, id: SetId, kept: str, meta: dict[str, Any]) -> None:
        """Run a save in its thread. Every failure becomes a warning."""
        try:
            self._write(stage, id, kept, meta)
            self._stored = id.step
        except Exception as error:
            self._warnings.append(f"copy of step {id.step} in memory not made by rank {self.rank}: {error}")

    def _write(self, stage: StagingBuffers, id: SetId, kept: str, meta: dict[str, Any]) -> None:
        """Write the data file and then its index, to this node and the next node."""
        prune(self._folder, {id.name, kept}, self.attempt)
        folder = self._folder / id.name
        folder.mkdir(mode=0o700, exist_ok=True)
        index = stage.write(folder, self.rank)
        identity = {"rank": self.rank, "step": id.step, "attempt": id.attempt, "meta": meta}
        atomic_write_json(folder / index_name(self.rank), {**identity, **index})
        if self._next is not None:
            with closing(Peer(self._next.address, self.token, self.timeout)) as peer:
                for name in (data_name(self.rank), index_name(self.rank)):
                    peer.put(id.name, folder / name, kept)

    def require_room(self, shards: dict[str, Shard]) -> str | None:
        """Check that the copies of all ranks fit into the memory of their nodes. Collective.

        If they do not fit, raises UserError. If the run continues on fewer nodes, returns the reason instead.
        """
        home = self.shelves.home(self.rank)
        room = shutil.disk_usage(self._folder).free + folder_bytes(self._folder)
        everyone = gather((home, room, lay_out_shards(shards).data_bytes))
        for node, shelf in enumerate(self.shelves.nodes):
            rooms = [free for at, free, _ in everyone if at == node]
            parts = [bytes_ for at, _, bytes_ in everyone if node in (at, self.shelves.next(at))]
            if rooms and SETS * sum(parts) > min(rooms):
                return self._refuse(shelf.name, SETS * sum(parts), min(rooms))
        return None

    def _refuse(self, node: str, needed: int, room: int) -> str:
        folder = self._folder.parent
        text = f"{needed / 1e9:.3g} GB in {folder} of {node}, where {room / 1e9:.3g} GB are free"
        if self.shelves.full_size:
            raise UserError(
                "checkpoint.every_memory",
                "on",
                f"two copies of the state and two copies of the previous node's state need {text}",
                "free space, set checkpoint.memory_folder to a larger disk of the node, use more nodes, or set checkpoint.every_memory=0",
            )
        return f"no copies in memory while the run has fewer nodes: they need {text}"

    # Resuming -------------------------------------------------------------------------------------------------------

    def manifest(self) -> Manifest | None:
        """Returns the manifest of the copies to resume from, or None. Raises CheckpointDamaged."""
        if self.shelves.resume is None:
            return None
        folder, files = Path(self.shelves.resume), self.files()
        try:
            indexes = [files.index(rank) for rank in range(len(self.shelves.holders))]
            return manifest_of(folder, merge_indexes(indexes, json.loads(indexes[0])["meta"]))
        except (OSError, ValueError) as error:
            raise CheckpointDamaged(folder, f"its parts in memory cannot be combined ({error})") from error

    def files(self) -> "ShelfFiles":
        return ShelfFiles(self.shelves, self.token, self.rank, self.timeout)

    def mark_resumed(self) -> None:
        """Keep the loaded set of copies until a newer set is complete."""
        self._resumed = self.shelves.resume or ""


class ShelfFiles:
    """Reads the copies in memory that a run resumes from, on any node."""

    def __init__(self, shelves: Shelves, token: str, rank: int, timeout: float):
        assert shelves.resume is not None
        self._shelves, self._set, self._token, self._timeout = shelves, shelves.resume, token, timeout
        self._home = shelves.home(rank)
        self._here = FolderFiles(Path(shelves.nodes[self._home].folder) / self._set)

    def index(self, rank: int) -> bytes:
        if self._home in self._shelves.holders[rank]:
            return self._here.index(rank)
        with closing(self._peer(rank)) as peer:
            return peer.get(self._set, index_name(rank))

    @contextmanager
    def data(self, rank: int) -> Iterator[ReadSpan]:
        if self._home in self._shelves.holders[rank]:
            with self._here.data(rank) as read:
                yield read
            return
        with closing(self._peer(rank)) as peer:
            yield lambda view, position: peer.read(self._set, data_name(rank), view, position)

    def _peer(self, rank: int) -> Peer:
        """Connects to one of the nodes that hold this rank's file."""
        holders = self._shelves.holders[rank]
        return Peer(self._shelves.nodes[holders[self._home % len(holders)]].address, self._token, self._timeout)
