"""Who holds a run up, by comparing what every rank did: the rings of all ranks (cluster/comm_ring.py), and where their threads are.

In order, and the first that says something is what is said:

    1. stopped    a rank whose process is stopped
    2. differs    two ranks did something different as the same collective of their group, or sent what the other end did not expect.
                  Who of them is wrong: the one that does not do what it did in the step before, while the others do; else the one
                  against most of its group; else the one against the groups that do the same elsewhere; else that is not known
    3. absent     ranks for which others wait, directly or through others, and which themselves wait for no rank
    4. crossed    ranks that wait for each other: the one among them that does not do what it did in the step before
    5. stuck      all are in, and nobody gets out: a network or a device
    6. unknown

Nothing is guessed: where the rank is not known, none is named. All of this is a pure function.
"""

import linecache
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from cluster.cause import main_thread_frames
from cluster.comm_ring import CommRecord, RankTrace
from conf.schema import ROOT


class Fault(Enum):
    """What was found; its value says it of one rank."""

    stopped = "is stopped"
    skipped = "left out a collective"
    repeated = "did a collective once more"
    reordered = "changed the order of two collectives"
    resized = "takes part with another size"
    retyped = "takes part with another type of elements"
    other = "takes part in another collective"
    loader = "waits for its data"
    lock = "waits for a lock, a thread or a queue of its own process"
    absent = "does not come"
    unsent = "has not sent what another rank waits for"
    stuck = "is in, as all others, and does not get out"
    running = "gets on"
    unknown = "is not known"


ADVICE = {
    Fault.stopped: "find out who stopped it (a debugger, a job scheduler, SIGSTOP); `kill -CONT` lets it go on",
    Fault.skipped: "a condition around the collective holds on this rank alone; make it the same on all",
    Fault.repeated: "a loop around the collective runs once more on this rank alone; make it the same on all",
    Fault.reordered: "call both in the same order on all ranks",
    Fault.resized: "the tensor has another shape on this rank: look at what it is made from",
    Fault.retyped: "the tensor has another type on this rank: look at what it is made from",
    Fault.other: "the ranks went different ways in the code: look at the condition before this line",
    Fault.loader: "look at the file system of the data, and at the loader's thread in the stacks",
    Fault.lock: "look at who holds it: the other threads of this rank in the stacks",
    Fault.absent: "look at this line: what does it wait for, or compute?",
    Fault.unsent: "look at the stage before: its actions should send what is waited for",
    Fault.stuck: "look at the network and the devices of these ranks: dmesg, links, switches",
    Fault.running: "nothing; ask again if it stays so",
    Fault.unknown: "the stacks and the last records of all ranks are in the file of the incident",
}
LOADER_THREAD = re.compile(r"/train/data/")
"""Files that make batches."""
WAITS_HERE = re.compile(r"\b(acquire|join|wait|get|result)\(|\bwith \S*lock|_lock\b", re.IGNORECASE)
"""A line of the program that waits for something of its own process."""
OF_THREADS = re.compile(r"/(threading|queue|selectors|subprocess|multiprocessing/\w+|concurrent/\w+)\.py")
NEWS_SECONDS = 2.0
"""A run in which something happened since then gets on."""


class Waiting(NamedTuple):
    """A rank that waits, for what, and for whom."""

    rank: int
    record: CommRecord
    missing: tuple[int, ...]
    """Ranks that have not come; none where all are in."""


@dataclass
class Finding:
    """What the comparison says."""

    fault: Fault
    ranks: tuple[int, ...] = ()
    """The culprits; none where they are not known."""
    text: str = ""
    """A sentence about them."""
    where: str = ""
    """File and line."""
    waits: list[Waiting] = field(default_factory=list)
    among: tuple[int, ...] = ()
    """Ranks of which one is the culprit, where it is not known which."""

    @property
    def certain(self) -> bool:
        """Whether ranks are named by what they did, and not by the silence of others."""
        return bool(self.ranks)

    @property
    def advice(self) -> str:
        return ADVICE[self.fault]


def compare_ranks(
    traces: Mapping[int, RankTrace], stacks: Mapping[int, str], stopped: Iterable[int] = (), gone: Iterable[int] = ()
) -> Finding:
    """See the top of the file. stacks: of ranks that gave some, by faulthandler; stopped: ranks whose processes are stopped; gone:
    ranks that have ended, of which others say nothing new.
    """
    held, gone = sorted(set(stopped)), set(gone)
    waits = find_waits({rank: trace for rank, trace in traces.items() if rank not in gone and rank not in held})
    absent = _absent(traces, waits, gone)
    if held:
        also = [rank for rank in absent if rank not in held]
        text = "; ".join(
            [f"{_ranks_are(held)} stopped", *(_say_absent(traces, stacks, waits, rank)[1] for rank in also)]
        )
        return Finding(Fault.stopped, (*held, *also), text, _where(traces, stacks, held[0]), waits)
    if (found := find_difference(traces)) is not None:
        found.waits = waits
        return found
    if absent:
        said = [_say_absent(traces, stacks, waits, rank) for rank in absent]
        return Finding(
            said[0][0], tuple(absent), "; ".join(text for _, text in said), _where(traces, stacks, absent[0]), waits
        )
    blocked = {wait.rank for wait in waits}
    if any(wait.missing for wait in waits):
        return _crossed(traces, waits)
    if waits:
        record = waits[0].record
        text = f"all {len(blocked)} ranks are in {name_record(record)} and none gets out"
        return Finding(Fault.stuck, (), text, record.place, waits, tuple(sorted(blocked)))
    alone = [rank for rank in traces if rank not in gone]
    if len(alone) == 1 and len(traces) == 1:
        fault, text = _say_absent(traces, stacks, waits, alone[0])
        return Finding(fault, (alone[0],), text, _where(traces, stacks, alone[0]), waits)
    behind = min((traces[rank].step for rank in alone), default=0)
    late = [rank for rank in alone if traces[rank].step == behind]
    if late and len(late) < len(alone):
        fault, text = _say_absent(traces, stacks, waits, late[0])
        return Finding(fault, tuple(late), text, _where(traces, stacks, late[0]), waits)
    return Finding(
        Fault.unknown, (), "no rank waits for another, and none is behind the others", "", waits, tuple(alone)
    )


def name_record(record: CommRecord) -> str:
    """A collective, send or receive in words."""
    if record.peer >= 0:
        return f"{record.kind} {record.seq} {'to' if record.kind == 'send' else 'from'} rank {record.peer}"
    return f"{record.kind} {record.seq} of {record.group.label} {_short(record.group.ranks)}"


# Who waits ----------------------------------------------------------------------------------------------------------


def _entered(traces: Mapping[int, RankTrace]) -> dict[tuple, int]:
    """The number that every rank came to, by rank and channel."""
    entered = dict[tuple, int]()
    for rank, trace in traces.items():
        for record in trace.records:
            key = rank, *_channel(record)
            entered[key] = max(entered.get(key, 0), record.seq)
    return entered


def _channel(record: CommRecord) -> tuple:
    """What a number counts in."""
    group = record.group.name, record.group.ranks
    return (*group, record.kind, record.peer) if record.peer >= 0 else group


def find_waits(traces: Mapping[int, RankTrace]) -> list[Waiting]:
    """All waits of these ranks, those that began first in front."""
    entered, waits = _entered(traces), []
    for rank, trace in traces.items():
        for record in trace.blocked:
            if record.peer >= 0:
                other = "receive" if record.kind == "send" else "send"
                key = record.peer, record.group.name, record.group.ranks, other, rank
                missing = [record.peer] if entered.get(key, 0) < record.seq else []
            else:
                names = record.group.name, record.group.ranks
                missing = [one for one in record.group.ranks if entered.get((one, *names), 0) < record.seq]
            waits.append(Waiting(rank, record, tuple(missing)))
    return sorted(waits, key=lambda wait: wait.record.waited)


def _absent(traces: Mapping[int, RankTrace], waits: Sequence[Waiting], gone: set[int]) -> list[int]:
    """Ranks that others wait for, and which themselves wait for none."""
    waiting = {wait.rank for wait in waits}
    wanted = {rank for wait in waits for rank in wait.missing}
    return sorted(rank for rank in wanted if rank not in waiting and rank not in gone)


def _say_absent(
    traces: Mapping[int, RankTrace], stacks: Mapping[int, str], waits: Sequence[Waiting], rank: int
) -> tuple[Fault, str]:
    """What a rank does that does not come."""
    frames = main_thread_frames(stacks.get(rank, ""))
    trace = traces.get(rank)
    line = _source(frames)
    first = next((wait.record for wait in waits if rank in wait.missing), None)
    fault = Fault.absent
    own = next((frame for frame in frames if not OF_THREADS.search(frame)), "")
    if (trace is not None and trace.phase == "data") or LOADER_THREAD.search(own):
        fault = Fault.loader
    elif frames and (OF_THREADS.search(frames[0]) or (WAITS_HERE.search(line) and "sleep(" not in line)):
        fault = Fault.lock
    elif first is not None and first.kind == "receive":
        fault = Fault.absent if frames else Fault.unsent
    text = f"rank {rank} {fault.value}"
    if first is not None:
        text += f": others wait for it in {name_record(first)}{_at(first.place)}"
    if trace is not None and trace.step:
        text += f"; it is in step {trace.step}, {trace.phase}" + (f", action {trace.action}" if trace.action else "")
        text += f", layer {trace.layer}" if trace.layer >= 0 else ""
    if where := _where(traces, stacks, rank):
        text += f", at {where}" + (f": `{line}`" if line else "")
    return fault, text


def _where(traces: Mapping[int, RankTrace], stacks: Mapping[int, str], rank: int) -> str:
    """File and line of the innermost function of the program in which the main thread is; else that of its last record."""
    frames = main_thread_frames(stacks.get(rank, ""))
    frame = next((frame for frame in frames if not OF_THREADS.search(frame)), frames[0] if frames else "")
    if found := _FRAME.match(frame):
        return f"{found[1].removeprefix(f'{ROOT}/')}:{found[2]} in {found[3]}"
    trace = traces.get(rank)
    return (
        f"behind {trace.records[-1].place}" if trace is not None and trace.records and trace.records[-1].place else ""
    )


_FRAME = re.compile(r'File "(.+)", line (\d+) in (\S+)')


def _source(frames: Sequence[str]) -> str:
    """The line of the program at which the main thread is, where its file is here."""
    frame = next((frame for frame in frames if not OF_THREADS.search(frame)), "")
    found = _FRAME.match(frame)
    return linecache.getline(found[1], int(found[2])).strip()[:120] if found and Path(found[1]).suffix == ".py" else ""


# What differs -------------------------------------------------------------------------------------------------------

Signature = tuple[Any, ...]
EVEN = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce")
"""In which all ranks of a group have as many elements."""


def _common(record: CommRecord) -> Signature:
    """What all ranks of a group must have alike in a collective."""
    if record.kind in EVEN:
        return record.kind, record.dtype, record.sent, record.received
    return (record.kind, record.dtype) if record.kind == "all_to_all" else (record.kind,)


def _whole(record: CommRecord) -> Signature:
    return record.kind, record.dtype, record.sent, record.received, record.peer


def find_difference(traces: Mapping[int, RankTrace]) -> Finding | None:
    """The first collective of a group that its ranks did differently, or the first message that its two ends see differently."""
    by_group = defaultdict[tuple, dict[int, dict[int, CommRecord]]](lambda: defaultdict(dict))
    for rank, trace in traces.items():
        for record in trace.records:
            if record.peer < 0:
                by_group[record.group.name, record.group.ranks][record.seq][rank] = record
    found: list[tuple[float, Callable[[], Finding]]] = []
    for seqs in by_group.values():
        for seq in sorted(seqs):
            members = seqs[seq]
            if len(members) < 2:
                continue
            key = _common if len({_common(record) for record in members.values()}) > 1 else None
            if key is None and _loses(members):
                key = _whole
            if key is not None:
                began = max(record.began for record in members.values())
                found.append((began, lambda members=members, key=key: _blame(traces, by_group, members, key)))
                break
    found += [(late, lambda pair=pair: _blame_message(traces, *pair)) for late, pair in _odd_messages(traces)]
    return min(found, key=lambda one: one[0])[1]() if found else None


def _loses(members: Mapping[int, CommRecord]) -> bool:
    """Whether an exchange sends other amounts than are received."""
    records = list(members.values())
    if records[0].kind != "all_to_all" or len(records) < len(records[0].group.ranks):
        return False
    return sum(record.sent for record in records) != sum(record.received for record in records)


def _blame(
    traces: Mapping[int, RankTrace],
    by_group: Mapping[tuple, Mapping[int, Mapping[int, CommRecord]]],
    members: Mapping[int, CommRecord],
    key: Callable[[CommRecord], Signature],
) -> Finding:
    """Who of the ranks that did something different as the same collective is wrong."""
    changed = {rank: deviation for rank, record in members.items() if (deviation := _deviation(traces[rank], record))}
    votes = Counter(key(record) for record in members.values())
    (most, count), *_ = votes.most_common(1)
    if 0 < len(changed) < len(members):
        odd = sorted(changed)
    elif 2 * count > len(members):
        odd = sorted(rank for rank, record in members.items() if key(record) != most)
    else:
        odd = _against_others(by_group, members, key)
    example = next(iter(members.values()))
    title = f"{example.group.label} {_short(example.group.ranks)}"
    if not odd:
        did = "; ".join(f"rank {rank}: {_did(record)}" for rank, record in sorted(members.items())[:4])
        text = f"ranks {_short(members)} did different things as collective {example.seq} of {title}, and who of them is wrong is not known: {did}"
        return Finding(Fault.unknown, (), text, example.place, among=tuple(sorted(members)))
    rank = odd[0]
    mine, theirs = members[rank], next((record for other, record in sorted(members.items()) if other not in odd), None)
    fault, at = changed.get(rank) or (_kind_of(mine, theirs), mine)
    if len({one for one, _ in changed.values()}) > 1 or theirs is None:
        theirs = theirs or mine
    text = f"{_ranks(odd)} {fault.value} in {title}: "
    if fault in (Fault.skipped, Fault.repeated, Fault.reordered):
        text += f"{name_record(at)}{_at(at.place)} in step {mine.step}; so it did {_did(mine)} where the others did {_did(theirs)}"
    else:
        text += f"as number {mine.seq} it did {_did(mine)}, the others {_did(theirs)}"
    return Finding(fault, tuple(odd), text, (at.place if fault is Fault.skipped else mine.place) or mine.place)


def _against_others(by_group: Mapping, members: Mapping[int, CommRecord], key: Callable) -> list[int]:
    """The ranks that do not do what groups of the same kind do elsewhere, where these agree."""
    example = next(iter(members.values()))
    elsewhere = {
        key(record)
        for (name, ranks), seqs in by_group.items()
        if ranks != example.group.ranks and len(ranks) == len(example.group.ranks)
        for record in seqs.get(example.seq, {}).values()
        if record.group.label == example.group.label
    }
    if len(elsewhere) != 1:
        return []
    odd = sorted(rank for rank, record in members.items() if key(record) not in elsewhere)
    return odd if len(odd) < len(members) else []


def _kind_of(mine: CommRecord, theirs: CommRecord | None) -> Fault:
    if theirs is None or mine.kind != theirs.kind:
        return Fault.other
    same_type, same_size = mine.dtype == theirs.dtype, (mine.sent, mine.received) == (theirs.sent, theirs.received)
    return Fault.resized if same_type else Fault.retyped if same_size else Fault.other


def _deviation(trace: RankTrace, record: CommRecord) -> tuple[Fault, CommRecord] | None:
    """What a rank did differently in a group in this step than in the step before, up to this record; None where it did the same or
    nothing is known of that step.
    """

    def of(step: int) -> list[CommRecord]:
        return [one for one in trace.records if one.step == step and _channel(one) == _channel(record)]

    return _first_change(trace, record.step, of(record.step - 1), of(record.step), record.seq)


def _first_change(
    trace: RankTrace, step: int, before: list[CommRecord], now: list[CommRecord], until: int | None
) -> tuple[Fault, CommRecord] | None:
    """until: the number after which nothing counts."""
    if not before or trace.records[0].step >= step - 1:  # the ring has lost the beginning of that step
        return None

    def alike(one: CommRecord, other: CommRecord) -> bool:
        return _common(one) == _common(other) and one.peer == other.peer

    def matches(i: int, j: int) -> int:
        """For how long the present from i on does what the past did from j on; at the same place of the program counts twice."""
        count = 0
        for one, other in zip(now[i:], before[j:], strict=False):
            if not alike(one, other):
                break
            count += 1 + (one.place == other.place)
        return count

    for i, one in enumerate(now):
        if until is not None and one.seq > until:
            return None
        if i >= len(before):
            return (Fault.repeated, one) if i and alike(one, now[i - 1]) else (Fault.other, one)
        if alike(one, before[i]):
            continue
        swapped = i + 1 < min(len(now), len(before)) and alike(one, before[i + 1]) and alike(now[i + 1], before[i])
        later = next((j for j in range(i + 1, min(i + 4, len(before))) if alike(one, before[j])), None)
        skipped = matches(i, later) if later is not None else 0
        repeated = matches(i, i - 1) if i and alike(one, before[i - 1]) else 0
        if swapped:
            return Fault.reordered, one
        if skipped and skipped >= repeated:
            return Fault.skipped, before[i]
        if repeated:
            return Fault.repeated, one
        return _kind_of(one, before[i]), one
    return None


def _odd_messages(traces: Mapping[int, RankTrace]) -> list[tuple[float, tuple[int, CommRecord, int, CommRecord]]]:
    """Sends whose receive, of the same number, has another size or type: when the later of both began, and both."""
    sends = {
        (record.group.name, rank, record.peer, record.seq): record
        for rank, trace in traces.items()
        for record in trace.records
        if record.kind == "send"
    }
    odd = []
    for rank, trace in traces.items():
        for record in trace.records:
            sent = sends.get((record.group.name, record.peer, rank, record.seq)) if record.kind == "receive" else None
            if sent is not None and (sent.sent, sent.dtype) != (record.received, record.dtype):
                odd.append((max(sent.began, record.began), (record.peer, sent, rank, record)))
    return odd


def _blame_message(
    traces: Mapping[int, RankTrace], sender: int, sent: CommRecord, receiver: int, received: CommRecord
) -> Finding:
    """Who of the two ends of a message is wrong."""
    changed = {
        rank: found
        for rank, record in ((sender, sent), (receiver, received))
        if (found := _deviation(traces[rank], record))
    }
    text = (
        f"rank {sender} did {_did(sent)}{_action_of(sent)}, and rank {receiver} {_did(received)}{_action_of(received)}"
    )
    if len(changed) != 1:
        return Finding(
            Fault.unknown, (), f"{text}; who of them is wrong is not known", received.place, among=(sender, receiver)
        )
    (rank, (fault, at)), *_ = changed.items()
    return Finding(fault, (rank,), f"rank {rank} {fault.value}: {text}", at.place)


# Ranks that wait for each other -------------------------------------------------------------------------------------


def _crossed(traces: Mapping[int, RankTrace], waits: Sequence[Waiting]) -> Finding:
    """Whoever of the ranks that wait for each other does not do what it did in the step before."""
    ring = sorted({wait.rank for wait in waits if wait.missing})
    changed = dict[int, tuple[Fault, CommRecord]]()
    for rank in ring:
        records, step = traces[rank].records, traces[rank].step
        before, now = ([one for one in records if one.step == each] for each in (step - 1, step))
        if found := _first_change(traces[rank], step, before, now, None):
            changed[rank] = found
    each = "; ".join(
        f"rank {wait.rank} waits for {_ranks(wait.missing)} in {name_record(wait.record)}{_at(wait.record.place)}"
        for wait in waits[:4]
        if wait.missing
    )
    if not 0 < len(changed) < len(ring):
        text = f"ranks {_short(ring)} wait for each other, and who of them is wrong is not known: {each}"
        return Finding(Fault.unknown, (), text, waits[0].record.place, list(waits), tuple(ring))
    rank, (fault, at) = next(iter(changed.items()))
    text = f"{_ranks(changed)} {fault.value}: {name_record(at)}{_at(at.place)}, in step {traces[rank].step}; so ranks {_short(ring)} wait for each other: {each}"
    return Finding(fault, tuple(sorted(changed)), text, at.place, list(waits))


# Words --------------------------------------------------------------------------------------------------------------


def _did(record: CommRecord) -> str:
    """A record with its size."""
    sizes = sorted({record.sent, record.received} - {0}) or [0]
    what = f"{record.kind} of {' and '.join(map(str, sizes))} {record.dtype}" if record.dtype else record.kind
    if record.peer >= 0:
        what += f" {'to' if record.kind == 'send' else 'from'} rank {record.peer}"
    return what + _at(record.place)


def _at(place: str) -> str:
    return f" ({place})" if place else ""


def _action_of(record: CommRecord) -> str:
    return f" in action {record.action}" if record.action else ""


def _ranks(ranks: Iterable[int]) -> str:
    ranks = sorted(ranks)
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {_short(ranks)}"


def _ranks_are(ranks: Sequence[int]) -> str:
    return f"{_ranks(ranks)} {'is' if len(ranks) == 1 else 'are'}"


def _short(ranks: Iterable[int]) -> str:
    """Numbers of ranks; of many the first and the last."""
    ranks = sorted(ranks)
    if len(ranks) > 8:
        return f"[{ranks[0]}, {ranks[1]}, ... {ranks[-1]}]"
    return f"[{', '.join(map(str, ranks))}]"
