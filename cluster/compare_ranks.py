"""Finds the rank that holds up a run, from the rings (cluster/comm_ring.py) and the stacks of all ranks.

A ring is a file with a rank's recent communication. The first rule that matches decides:

    1. stopped    A rank's process is stopped.
    2. differs    Ranks called different operations as the same collective, or a rank sent what its receiver did not
                  expect. The first test that finds a wrong rank decides:
                      A rank differs from most ranks of its group.
                      Only one rank differs from its own earlier step (the last step, or the step one period earlier).
                      A rank differs from other groups with the same label.
    3. absent     Ranks wait, directly or indirectly, for a rank that waits for no rank.
    4. link       Sent data is not acknowledged between some hosts, and all these connections have one host in common.
    5. crossed    Ranks wait for each other. The wrong rank is the rank that differs from its own last step.
    6. stuck      All ranks are in the collective and none returns: a fault of a network or a device.
    7. unknown    No rule matches.

If the wrong rank is unknown, no rank is named.
"""

import linecache
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cluster.cause import main_thread_frames
from cluster.comm_ring import CommRecord, RankTrace
from cluster.judgement import (
    Fault,
    Judgement,
    RankWait,
    channel_of,
    list_ranks,
    name_record,
    place_in_words,
    ranks_in_words,
)
from cluster.rank_differences import find_difference, first_change
from conf.schema import ROOT

LOADER_THREAD = re.compile(r"/train/data/")
"""Matches paths of source files that load data."""
WAITS_HERE = re.compile(r"\b(acquire|join|wait|get|result)\(|\bwith \S*lock|_lock\b", re.IGNORECASE)
"""Matches a source line that waits inside its own process."""
OF_THREADS = re.compile(r"/(threading|queue|selectors|subprocess|multiprocessing/\w+|concurrent/\w+)\.py")
PROGRESS_SECONDS = 2.0
"""Maximum age in seconds of an event that shows progress."""


def compare_ranks(
    traces: Mapping[int, RankTrace], stacks: Mapping[int, str], stopped: Iterable[int] = (), gone: Iterable[int] = ()
) -> Judgement:
    """Find the faulty rank by the rules at the top of the file.

    stacks: faulthandler stacks by rank. stopped: ranks with stopped processes. gone: ended ranks, never named.
    """
    held, gone = sorted(set(stopped)), set(gone)
    waits = find_waits({rank: trace for rank, trace in traces.items() if rank not in gone and rank not in held})
    absent = _absent(traces, waits, gone)
    if held:
        also = [rank for rank in absent if rank not in held]
        text = "; ".join(
            [f"{_ranks_are(held)} stopped", *(_say_absent(traces, stacks, waits, rank)[1] for rank in also)]
        )
        return Judgement(Fault.stopped, (*held, *also), text, _where(traces, stacks, held[0]), waits)
    if (found := find_difference(traces)) is not None:
        found.waits = waits
        return found
    if absent:
        said = [_say_absent(traces, stacks, waits, rank) for rank in absent]
        return Judgement(
            said[0][0], tuple(absent), "; ".join(text for _, text in said), _where(traces, stacks, absent[0]), waits
        )
    if (lost := _find_bad_link(stacks)) is not None:
        lost.waits = waits
        return lost
    blocked = {wait.rank for wait in waits}
    if any(wait.missing for wait in waits):
        return _crossed(traces, waits)
    if waits:
        record = waits[0].record
        text = f"all {len(blocked)} ranks are in {name_record(record)} and none of them returns"
        return Judgement(Fault.stuck, (), text, record.place, waits, tuple(sorted(blocked)))
    alone = [rank for rank in traces if rank not in gone]
    if len(alone) == 1 and len(traces) == 1:
        fault, text = _say_absent(traces, stacks, waits, alone[0])
        return Judgement(fault, (alone[0],), text, _where(traces, stacks, alone[0]), waits)
    behind = min((traces[rank].step for rank in alone), default=0)
    late = [rank for rank in alone if traces[rank].step == behind]
    if late and len(late) < len(alone):
        fault, text = _say_absent(traces, stacks, waits, late[0])
        return Judgement(fault, tuple(late), text, _where(traces, stacks, late[0]), waits)
    return Judgement(
        Fault.unknown, (), "no rank waits for another rank, and no rank is behind the others", "", waits, tuple(alone)
    )


# Who waits ----------------------------------------------------------------------------------------------------------


def _entered(traces: Mapping[int, RankTrace]) -> dict[tuple, int]:
    """Return the highest sequence number by rank and channel (see `channel_of`)."""
    entered = dict[tuple, int]()
    for rank, trace in traces.items():
        for record in trace.records:
            key = rank, *channel_of(record)
            entered[key] = max(entered.get(key, 0), record.seq)
    return entered


def find_waits(traces: Mapping[int, RankTrace]) -> list[RankWait]:
    """Return all waits of these ranks, sorted by start time."""
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
            waits.append(RankWait(rank, record, tuple(missing)))
    return sorted(waits, key=lambda wait: wait.record.waited)


def _absent(traces: Mapping[int, RankTrace], waits: Sequence[RankWait], gone: set[int]) -> list[int]:
    """Return the ranks for which other ranks wait, and which wait for no rank."""
    waiting = {wait.rank for wait in waits}
    wanted = {rank for wait in waits for rank in wait.missing}
    return sorted(rank for rank in wanted if rank not in waiting and rank not in gone)


def _say_absent(
    traces: Mapping[int, RankTrace], stacks: Mapping[int, str], waits: Sequence[RankWait], rank: int
) -> tuple[Fault, str]:
    """Describe what an absent rank is doing."""
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
        text += f": others wait for it in {name_record(first)}{place_in_words(first.place)}"
    if trace is not None and trace.step:
        text += f"; it is in step {trace.step}, {trace.phase}" + (f", action {trace.action}" if trace.action else "")
        text += f", layer {trace.layer}" if trace.layer >= 0 else ""
    if where := _where(traces, stacks, rank):
        text += f", at {where}" + (f": `{line}`" if line else "")
    return fault, text


def _where(traces: Mapping[int, RankTrace], stacks: Mapping[int, str], rank: int) -> str:
    """Return the file and line that a rank's main thread executes, outside thread libraries. Without a stack trace,
    return the file and line of the rank's last recorded operation.
    """
    frames = main_thread_frames(stacks.get(rank, ""))
    frame = next((frame for frame in frames if not OF_THREADS.search(frame)), frames[0] if frames else "")
    if found := _FRAME.match(frame):
        return f"{found[1].removeprefix(f'{ROOT}/')}:{found[2]} in {found[3]}"
    trace = traces.get(rank)
    return f"after {trace.records[-1].place}" if trace is not None and trace.records and trace.records[-1].place else ""


def _find_bad_link(stacks: Mapping[int, str]) -> Judgement | None:
    """Find the host that all connections with unacknowledged data have in common (cluster/stacks.py), or None."""
    said = {rank: found for rank, stack in stacks.items() if (found := _UNANSWERED.search(stack))}
    pairs = {frozenset((found[1], other)) for found in said.values() for other in found[2].split(", ") if other}
    if not pairs:
        return None
    bad = frozenset.intersection(*pairs) or frozenset.union(*pairs)
    ranks = tuple(sorted(rank for rank, found in said.items() if found[1] in bad))
    each = "; ".join(" and ".join(sorted(pair)) for pair in sorted(pairs, key=sorted)[:4])
    text = f"sent data is not acknowledged between {each}"
    if len(bad) == 1 and ranks:
        return Judgement(Fault.link, ranks, f"{ranks_in_words(ranks)} {Fault.link.value} ({', '.join(bad)}): {text}")
    return Judgement(Fault.link, (), f"{text}; the host with the bad link is unknown", among=ranks)


_UNANSWERED = re.compile(r"^Sent from (\S+) and not acknowledged by: (.*)$", re.MULTILINE)
_FRAME = re.compile(r'File "(.+)", line (\d+) in (\S+)')


def _source(frames: Sequence[str]) -> str:
    """Return the source line that the main thread executes, if this machine has it."""
    frame = next((frame for frame in frames if not OF_THREADS.search(frame)), "")
    found = _FRAME.match(frame)
    return linecache.getline(found[1], int(found[2])).strip()[:120] if found and Path(found[1]).suffix == ".py" else ""


# Ranks that wait for each other -------------------------------------------------------------------------------------


def _crossed(traces: Mapping[int, RankTrace], waits: Sequence[RankWait]) -> Judgement:
    """Find, among ranks that wait for each other, the rank whose current step differs from its own previous step."""
    ring = sorted({wait.rank for wait in waits if wait.missing})
    changed = dict[int, tuple[Fault, CommRecord]]()
    for rank in ring:
        records, step = traces[rank].records, traces[rank].step
        before, now = ([one for one in records if one.step == each] for each in (step - 1, step))
        if found := first_change(traces[rank], step, before, now, None):
            changed[rank] = found
    each = "; ".join(
        f"rank {wait.rank} waits for {ranks_in_words(wait.missing)} in {name_record(wait.record)}{place_in_words(wait.record.place)}"
        for wait in waits[:4]
        if wait.missing
    )
    if not 0 < len(changed) < len(ring):
        text = f"ranks {list_ranks(ring)} wait for each other; which of them is wrong is unknown: {each}"
        return Judgement(Fault.unknown, (), text, waits[0].record.place, list(waits), tuple(ring))
    rank, (fault, at) = next(iter(changed.items()))
    text = f"{ranks_in_words(changed)} {fault.value}: {name_record(at)}{place_in_words(at.place)}, in step {traces[rank].step}; so ranks {list_ranks(ring)} wait for each other: {each}"
    return Judgement(fault, tuple(sorted(changed)), text, at.place, list(waits))


def _ranks_are(ranks: Sequence[int]) -> str:
    return f"{ranks_in_words(ranks)} {'is' if len(ranks) == 1 else 'are'}"
