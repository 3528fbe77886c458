"""The verdict on a failed or hung run: kind of fault, guilty rank, waits between ranks, and texts for the user.

cluster/compare_ranks.py uses recorded communication, cluster/cause.py the ranks' reports.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from cluster.comm_ring import CommRecord


class Fault(Enum):
    """Kinds of fault; the values follow "rank N" in texts."""

    stopped = "is stopped"
    failed = "failed, according to its own report or its process"
    skipped = "skipped or delayed a collective"
    repeated = "repeated a collective"
    reordered = "changed the order of two collectives"
    resized = "joined with another size"
    retyped = "joined with another dtype"
    other = "joined another collective"
    loader = "waits for its data"
    lock = "waits for a lock, a thread or a queue in its own process"
    absent = "has not joined"
    unsent = "has not sent the data that another rank waits for"
    link = "is unreachable over the network, or very slow"
    stuck = "has joined, like all others, and does not return"
    unknown = "is unknown"


FAULT_ADVICE = {
    Fault.stopped: "find out what stopped it: a debugger, a job scheduler, or a SIGSTOP signal",
    Fault.failed: "the lines above come from the rank that failed first",
    Fault.skipped: "a condition around the collective is true only on this rank; make it equal on all ranks",
    Fault.repeated: "a loop around the collective runs once more on this rank; make the count equal on all ranks",
    Fault.reordered: "call both collectives in the same order on all ranks",
    Fault.resized: "the tensor has another shape on this rank: check how it is computed",
    Fault.retyped: "the tensor has another dtype on this rank: check how it is computed",
    Fault.other: "the ranks took different branches: check the condition before this line",
    Fault.loader: "check the file system of the data, and the loader's thread in the stacks",
    Fault.lock: "check which thread of this rank holds it, in the stacks",
    Fault.absent: "check this line: it computes, or waits for something other than ranks",
    Fault.unsent: "check the previous stage, which should have sent the data",
    Fault.link: "check the link of this host: `ip -s link`, cable, switch, dmesg",
    Fault.stuck: "check the network and the devices of these ranks: dmesg, links, switches",
    Fault.unknown: "see the incident file for the stacks and the last records of all ranks",
}


class RankWait(NamedTuple):
    """A waiting rank, its operation, and the ranks that it waits for."""

    rank: int
    record: CommRecord
    missing: tuple[int, ...]
    """Ranks that have not entered the operation, if any."""


@dataclass
class Judgement:
    """The verdict on a failed or hung run."""

    fault: Fault
    ranks: tuple[int, ...] = ()
    """The ranks that caused the fault; empty if they are unknown."""
    text: str = ""
    """A sentence about the ranks that caused the fault."""
    where: str = ""
    """File and line of the fault."""
    waits: list[RankWait] = field(default_factory=list)
    among: tuple[int, ...] = ()
    """Ranks that may have caused the fault, if `ranks` is empty."""

    @property
    def advice(self) -> str:
        return FAULT_ADVICE[self.fault]


def name_record(record: CommRecord) -> str:
    """Describe a collective, send or receive."""
    if record.peer >= 0:
        return f"{record.kind} {record.seq} {'to' if record.kind == 'send' else 'from'} rank {record.peer}"
    return f"{record.kind} {record.seq} of {record.group.label} {list_ranks(record.group.ranks)}"


def channel_of(record: CommRecord) -> tuple:
    """Return the channel whose records are numbered together: the group of a collective; group, kind and peer of a
    message.
    """
    group = record.group.name, record.group.ranks
    return (*group, record.kind, record.peer) if record.peer >= 0 else group


def record_in_words(record: CommRecord) -> str:
    """Describe a record: kind, elements, peer, and location in the code."""
    sizes = sorted({record.sent, record.received} - {0}) or [0]
    what = f"{record.kind} of {' and '.join(map(str, sizes))} {record.dtype}" if record.dtype else record.kind
    if record.peer >= 0:
        what += f" {'to' if record.kind == 'send' else 'from'} rank {record.peer}"
    return what + place_in_words(record.place)


def place_in_words(place: str) -> str:
    return f" ({place})" if place else ""


def ranks_in_words(ranks: Iterable[int]) -> str:
    ranks = sorted(ranks)
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {list_ranks(ranks)}"


def list_ranks(ranks: Iterable[int]) -> str:
    """Return ranks as text. If there are more than 8, the text has only the first two and the last."""
    ranks = sorted(ranks)
    if len(ranks) > 8:
        return f"[{ranks[0]}, {ranks[1]}, ... {ranks[-1]}]"
    return f"[{', '.join(map(str, ranks))}]"
