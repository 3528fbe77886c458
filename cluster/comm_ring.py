"""Stores a rank's recent communication in a file that outlives the rank: the rank's ring.

The ring records collectives, sends and receives, with step, phase and pipeline action. It is mapped into memory, so its
content survives SIGKILL. Its parts:

    header    80 bytes: magic, version, number of records, rank, number of ranks, process id, Unix time of creation,
              host
    state     48 bytes: current step, phase, layer and action; Unix time at which the phase or action began; number of
              completed work units; bytes of checkpoints written
    table     rest of the first 64 KiB: one line of JSON for each group of ranks and each location in the code. Records
              refer to a line by its number. A line is written before the first record that refers to it
    records   88 bytes each; a new record overwrites the oldest record

Threads write without a lock. A record is complete if the unique numbers at its start and its end are equal. Readers
skip incomplete records. This file does not import torch.
"""

import itertools
import json
import math
import mmap
import os
import socket
import struct
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cluster.clocks import SteadyClock
from cluster.run_files import COUNTS, COUNTS_AT, ring_path
from cluster.spawn import holds_open
from conf.files import read_plain

MAGIC, RING_FORMAT = b"SLUICERING\0\0", 1
MOST_RANKS = 1 << 20
RING_BYTES = 16 << 20
"""Maximum bytes that a reader reads from a ring file."""
RECORDS = 8192
"""Number of records in a ring; enough for some steps of a large layout."""
NOW_AT, TABLE_AT, RECORDS_AT = 80, 128, 64 << 10
"""Byte offsets of the current state, the table and the records."""
HEADER = struct.Struct("<12sIIIIId32s")
NOW = struct.Struct("<IhBxHHH2xd")
"""Format of the current state: step, layer, phase, kind of action, stage, micro-batch, Unix time."""
RECORD = struct.Struct("<QIHHBBhIi4xQQHHHBxdddQ")
"""Format of a record: serial, seq, group, place, kind, type, layer, step, peer, sent, received, action, stage,
micro-batch, phase, began, waited, ended, serial.
"""
WAITED_AT, ENDED_AT = 64, 72
"""Byte offsets of the fields `waited` and `ended` within a record."""
RANK_PHASES = ("start", "data", "schedule", "reduction", "update", "record", "validation", "checkpoint")
"""Phases of a rank's work."""
KINDS = (
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "barrier", "send", "receive", "reduce", "gather", "scatter",
)  # fmt: skip
ELEMENT_TYPES = (
    "",
    "float32",
    "float64",
    "bfloat16",
    "float16",
    "uint8",
    "int8",
    "int32",
    "int64",
    "bool",
    "int16",
    "float8_e4m3fn",
    "other",
)
"""Names of element types. The first, "", means that nothing is sent."""
_KIND_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
_DTYPE_NUMBERS = {dtype: number for number, dtype in enumerate(ELEMENT_TYPES)}
_OTHER = ELEMENT_TYPES.index("other")
_TIME, _SERIAL, _COUNT = struct.Struct("<d"), struct.Struct("<Q"), struct.Struct("<I")
LEAST_SENT, ALL_SENT = 128, 1 << 20
"""Limits of `pack_ring`: minimum records of one ring, and maximum records of all rings together."""
NO_LAYER = -1


class CommGroup(NamedTuple):
    """A group of ranks that communicate. name: equal on all its ranks. label: the layout's name for the group."""

    name: str
    label: str
    ranks: tuple[int, ...]


class CommRecord(NamedTuple):
    """One collective, send or receive, as recorded by one rank."""

    group: CommGroup
    seq: int
    """Number of the operation in its group, from 1; for sends and receives, per pair of ranks."""
    kind: str
    dtype: str
    sent: int
    received: int
    """Numbers of sent and of received elements."""
    peer: int
    """Rank at the other end of a message; -1 for a collective."""
    step: int
    phase: str
    layer: int
    """The layer that the rank entered last in this pipeline action, or -1."""
    action: str
    """The pipeline action, such as `F2.0` (forward of micro-batch 0 through stage 2), or empty."""
    place: str
    """File and line of the code that called the operation."""
    began: float
    waited: float
    """Unix time at which the rank's wait for the operation began, or 0."""
    ended: float
    """Unix time at which the rank knew the operation to be complete, or 0."""

    @property
    def blocks(self) -> bool:
        """Whether the rank is now waiting for this operation."""
        return self.waited > 0 and self.ended == 0


@dataclass
class RankTrace:
    """Content of one rank's ring file."""

    rank: int
    world: int
    pid: int
    host: str
    started: float
    """Unix time at which the ring was created."""
    records: list[CommRecord] = field(default_factory=list)
    """The newest records, in the order of writing."""
    step: int = 0
    phase: str = "start"
    layer: int = NO_LAYER
    action: str = ""
    since: float = 0.0
    """Unix time at which the current phase or action began."""

    @property
    def is_here(self) -> bool:
        """Whether the rank's process runs on this host."""
        return self.host.encode() == _host()

    @property
    def blocked(self) -> list[CommRecord]:
        """Operations for which the rank is waiting now, oldest first."""
        return [record for record in self.records if record.blocks]


class CommRing:
    """Writes a rank's ring file in its full size. Raises OSError on a full disk."""

    def __init__(self, path: Path, rank: int, world: int, records: int = RECORDS):
        path.parent.mkdir(parents=True, exist_ok=True)
        size = RECORDS_AT + records * RECORD.size
        with suppress(FileNotFoundError):
            path.unlink()  # a process that has an earlier attempt's file open can still read it
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(handle, 0, size)  # otherwise a full disk would end the rank by SIGBUS
            self._map = mmap.mmap(handle, size)
        finally:
            os.close(handle)
        self._records, self._serials, self._table_end = records, itertools.count(1), TABLE_AT
        self._now = SteadyClock().now
        self._numbers: dict[Any, int] = {}
        """For each group and each code location: number of its line in the file's table."""
        self.step, self.phase, self.layer, self._action = 0, 0, NO_LAYER, (0, 0, 0)
        self._done = self._written = 0
        HEADER.pack_into(self._map, 0, MAGIC, RING_FORMAT, records, rank, world, os.getpid(), time.time(), _host())
        self._tell()

    def enter(self, phase: str, step: int | None = None) -> None:
        """Record that the rank enters another phase. phase: one of RANK_PHASES."""
        self.phase, self.layer, self._action = RANK_PHASES.index(phase), NO_LAYER, (0, 0, 0)
        if step is not None:
            self.step = step
        self._tell()

    def act(self, kind: str, stage: int, micro_batch: int) -> None:
        """Record that a pipeline action begins. kind: one or two letters."""
        self.layer, self._action = NO_LAYER, (int.from_bytes(kind.encode(), "little"), stage, micro_batch)
        self._tell()

    def _tell(self) -> None:
        NOW.pack_into(self._map, NOW_AT, self.step, self.layer, self.phase, *self._action, self._now())
        self.count()

    def count(self, written: int = 0) -> None:
        """Count one unit of work. If `written` is not 0, count this number of checkpoint bytes instead."""
        self._done, self._written = self._done + (not written), self._written + written
        COUNTS.pack_into(self._map, COUNTS_AT, self._done, self._written)

    def name_group(self, name: str, label: str, ranks: Sequence[int]) -> int:
        """Return the number of a group's line in the table, for `begin`."""
        return self._number((name, *ranks), ["group", name, label, _as_range(ranks)])

    def place(self, file: str, line: int) -> int:
        """Return the number of a code location's line in the table, for `begin`."""
        return self._number((file, line), ["place", file, line])

    def _number(self, key: Any, entry: list) -> int:
        """Return the number, from 1, of the table line with this entry; 0 if the table is full."""
        found = self._numbers.get(key)
        if found is None:
            text = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
            fits = self._table_end + len(text) < RECORDS_AT
            found = self._numbers[key] = 1 + sum(number > 0 for number in self._numbers.values()) if fits else 0
            if fits:
                self._map[self._table_end : self._table_end + len(text)] = text
                self._table_end += len(text)
        return found

    def begin(
        self, group: int, seq: int, kind: str, dtype: str, sent: int, received: int, peer: int, place: int
    ) -> int:
        """Record that an operation begins. Returns the record's byte offset.

        group, place: numbers from `name_group` and `place`. kind: one of KINDS.
        """
        self.count()
        serial, now = next(self._serials), self._now()
        at = RECORDS_AT + (serial - 1) % self._records * RECORD.size
        action, stage, micro_batch = self._action
        RECORD.pack_into(
            self._map, at, serial, seq, group, place, _KIND_NUMBERS[kind], _DTYPE_NUMBERS.get(dtype, _OTHER), self.layer, self.step, peer, sent, received, action, stage,
            micro_batch, self.phase, now, 0.0, 0.0, serial,
        )  # fmt: skip
        return at

    def wait(self, at: int) -> None:
        """Record that the rank waits for an operation. at: its record's offset."""
        _TIME.pack_into(self._map, at + WAITED_AT, self._now())

    def end(self, at: int) -> None:
        """Record that an operation is complete. at: its record's offset."""
        _TIME.pack_into(self._map, at + ENDED_AT, self._now())

    def close(self) -> None:
        """Close the memory mapping; the file remains."""
        self._map.close()


def _host() -> bytes:
    return socket.gethostname().encode()[:32]


def _as_range(ranks: Sequence[int]) -> list[int]:
    """Encode evenly spaced ranks as [first, last + 1, step], and other ranks as a list that starts with -1."""
    if len(ranks) > 1:
        stride = ranks[1] - ranks[0]
        if stride > 0 and list(ranks) == list(range(ranks[0], ranks[-1] + 1, stride)):
            return [ranks[0], ranks[-1] + 1, stride]
    return [-1, *ranks]


def _from_range(said: list[int]) -> tuple[int, ...]:
    """Decode a list of `_as_range`; earlier versions wrote 0 instead of -1. Raises ValueError for too many ranks."""
    ranks = range(*said) if len(said) == 3 and said[0] >= 0 else said[1:]
    if len(ranks) > MOST_RANKS:
        raise ValueError("a group of more ranks than a run has")
    return tuple(ranks)


def read_trace(raw: bytes, last: int = RECORDS) -> RankTrace:
    """Parse the content of a ring file. Raises ValueError if it is invalid.

    last: maximum number of records to return, the newest ones
    """
    if len(raw) < RECORDS_AT or raw[: len(MAGIC)] != MAGIC:
        raise ValueError("no ring of a rank")
    _, version, records, rank, world, pid, started, host = HEADER.unpack_from(raw)
    if version != RING_FORMAT:
        raise ValueError(f"a ring of format {version}, where this version reads {RING_FORMAT}")
    trace = RankTrace(rank, world, pid, host.rstrip(b"\0").decode(errors="replace"), started)
    trace.step, trace.layer, phase, *action, trace.since = NOW.unpack_from(raw, NOW_AT)
    if not (math.isfinite(started) and math.isfinite(trace.since)):
        raise ValueError("a ring without a time")
    trace.phase, trace.action = RANK_PHASES[min(phase, len(RANK_PHASES) - 1)], _action(*action)
    groups, places = _read_table(raw[TABLE_AT:RECORDS_AT])
    found = []
    for at in range(RECORDS_AT, min(len(raw), RECORDS_AT + records * RECORD.size) - RECORD.size + 1, RECORD.size):
        values = RECORD.unpack_from(raw, at)
        if values[0] and values[0] == values[-1] and all(map(math.isfinite, values[-4:-1])):
            found.append(values)
    found.sort()
    trace.records = [_record(values, groups, places) for values in found[-last:]]
    return trace


def _read_table(table: bytes) -> tuple[dict[int, CommGroup], dict[int, str]]:
    groups, places = dict[int, CommGroup](), dict[int, str]()
    for number, line in enumerate(table.split(b"\0", 1)[0].splitlines(), 1):
        with suppress(ValueError, RecursionError):  # an incomplete line belongs to an entry that no record uses yet
            match json.loads(line):
                case ["group", str(name), str(label), [int(), *_] as said] if all(isinstance(one, int) for one in said):
                    groups[number] = CommGroup(name, label, _from_range(said))
                case ["place", str(file), int(at)]:
                    places[number] = f"{file}:{at}"
    return groups, places


def _record(values: tuple, groups: dict[int, CommGroup], places: dict[int, str]) -> CommRecord:
    (
        _,
        seq,
        group,
        place,
        kind,
        dtype,
        layer,
        step,
        peer,
        sent,
        received,
        action,
        stage,
        micro_batch,
        phase,
        began,
        waited,
        ended,
        _,
    ) = values
    return CommRecord(
        groups.get(group, CommGroup("?", "?", ())), seq, KINDS[min(kind, len(KINDS) - 1)], ELEMENT_TYPES[min(dtype, len(ELEMENT_TYPES) - 1)], sent,
        received, peer, step, RANK_PHASES[min(phase, len(RANK_PHASES) - 1)], layer, _action(action, stage, micro_batch), places.get(place, ""),
        began, waited, ended,
    )  # fmt: skip


def _action(kind: int, stage: int, micro_batch: int) -> str:
    letters = kind.to_bytes(2, "little").rstrip(b"\0").decode("ascii", "replace")
    return f"{letters}{stage}.{micro_batch}" if letters else ""


def read_traces(logs: Path, since: float = 0.0) -> dict[int, RankTrace]:
    """Read the folder's rings by rank. Rings created before the Unix time `since` are skipped."""
    traces = dict[int, RankTrace]()
    for path in logs.glob("rank_*.ring"):
        # Skip the ring of a rank that has just started, or that another version wrote.
        with suppress(OSError, ValueError):
            trace = read_trace(read_plain(path, RING_BYTES))
            if trace.started >= since:
                traces[trace.rank] = trace
    world = max((trace.world for trace in sorted(traces.values(), key=lambda one: one.started)[-1:]), default=0)
    return {rank: trace for rank, trace in traces.items() if rank < world}


def living_ranks(logs: Path, traces: Mapping[int, RankTrace]) -> dict[int, int]:
    """Return the ids, by rank, of this user's processes on this host that write these rings now."""
    return {
        rank: trace.pid
        for rank, trace in traces.items()
        if trace.is_here and holds_open(trace.pid, ring_path(logs, rank))
    }


def pack_ring(path: Path, world: int) -> bytes:
    """Return a ring's newest records, compressed for transfer; empty without a ring. With more ranks (`world`), fewer
    records are kept.
    """
    try:
        raw = read_plain(path, RING_BYTES)
    except (OSError, ValueError):
        return b""
    most = min(RECORDS, max(LEAST_SENT, ALL_SENT // max(1, world)))
    records = [raw[at : at + RECORD.size] for at in range(RECORDS_AT, len(raw) - RECORD.size + 1, RECORD.size)]
    newest = sorted(records, key=lambda record: _SERIAL.unpack_from(record)[0])[-most:]
    head = bytearray(raw[:RECORDS_AT])
    if len(head) < RECORDS_AT:
        return b""
    _COUNT.pack_into(head, 16, len(newest))
    return zlib.compress(bytes(head) + b"".join(newest), 1)


# Counts progress between two steps in the rank's ring, so that no watcher mistakes a slow rank for a hung rank.
#
# Slow code calls `got_on` after each unit of work, such as a batch, a micro-batch of a validation, or a generated
# token. The code that writes a checkpoint calls `wrote`. Written bytes count as progress only while a rank waits for a
# checkpoint. Without a ring, both functions do nothing.

_rings: list[CommRing] = []
"""Rings for this process's progress counts. Only the last one is used."""


@contextmanager
def counted_in(ring: CommRing) -> Iterator[None]:
    """Context manager that counts the progress of its block in `ring`."""
    _rings.append(ring)
    try:
        yield
    finally:
        _rings.remove(ring)


def got_on() -> None:
    """Count one unit of work of this rank."""
    for ring in _rings[-1:]:
        ring.count()


def wrote(size: int) -> None:
    """Count `size` bytes of a checkpoint that this rank has written."""
    for ring in _rings[-1:]:
        ring.count(written=size)
