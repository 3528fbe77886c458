"""Finds the first collective or message in which ranks differ, and the wrong rank."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cluster.comm_ring import CommRecord, RankTrace
from cluster.judgement import (
    Fault,
    Judgement,
    channel_of,
    list_ranks,
    name_record,
    place_in_words,
    ranks_in_words,
    record_in_words,
)

Signature = tuple[Any, ...]
EVEN = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "send", "receive")
"""Kinds of operations with equal numbers of elements on all ranks of a group, or on both ends of a message."""


def _common(record: CommRecord) -> Signature:
    """Return the properties of a collective that are equal on all ranks."""
    if record.kind in EVEN:
        return record.kind, record.dtype, record.sent, record.received
    return (record.kind, record.dtype) if record.kind == "all_to_all" else (record.kind,)


def _whole(record: CommRecord) -> Signature:
    return record.kind, record.dtype, record.sent, record.received, record.peer


def find_difference(traces: Mapping[int, RankTrace]) -> Judgement | None:
    """Find the first collective or message in which ranks differ, or None."""
    by_group = defaultdict[tuple, dict[int, dict[int, CommRecord]]](lambda: defaultdict(dict))
    for rank, trace in traces.items():
        for record in trace.records:
            if record.peer < 0:
                by_group[record.group.name, record.group.ranks][record.seq][rank] = record
    found: list[tuple[float, Callable[[], Judgement]]] = []
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
    """Whether the totals of sent and received elements of an all-to-all differ."""
    records = list(members.values())
    if records[0].kind != "all_to_all" or len(records) < len(records[0].group.ranks):
        return False
    return sum(record.sent for record in records) != sum(record.received for record in records)


def _blame(
    traces: Mapping[int, RankTrace],
    by_group: Mapping[tuple, Mapping[int, Mapping[int, CommRecord]]],
    members: Mapping[int, CommRecord],
    key: Callable[[CommRecord], Signature],
) -> Judgement:
    """Name the wrong rank among ranks that called a collective differently."""
    changed = {rank: deviation for rank, record in members.items() if (deviation := _deviation(traces[rank], record))}
    votes = Counter(key(record) for record in members.values())
    (most, count), *_ = votes.most_common(1)
    if 2 * count > len(members):
        odd = sorted(rank for rank, record in members.items() if key(record) != most)
    elif 0 < len(changed) < len(members):
        odd = sorted(changed)
    else:
        odd = _against_others(by_group, members, key)
    example = next(iter(members.values()))
    title = f"{example.group.label} {list_ranks(example.group.ranks)}"
    if not odd:
        did = "; ".join(f"rank {rank}: {record_in_words(record)}" for rank, record in sorted(members.items())[:4])
        text = f"ranks {list_ranks(members)} differ in collective {example.seq} of {title}, and which of them is wrong is unknown: {did}"
        return Judgement(Fault.unknown, (), text, example.place, among=tuple(sorted(members)))
    rank, other = odd[0], next(one for one in sorted(members) if one not in odd)
    mine, theirs = members[rank], members[other]
    fault, at = (
        changed.get(rank) or _against_other(traces[rank], mine, traces[other], theirs) or (_kind_of(mine, theirs), mine)
    )
    text = f"{ranks_in_words(odd)} {fault.value} in {title}: "
    if fault in (Fault.skipped, Fault.repeated, Fault.reordered):
        text += f"{name_record(at)}{place_in_words(at.place)} in step {mine.step}; so it called {record_in_words(mine)} where the others called {record_in_words(theirs)}"
    else:
        text += f"call {mine.seq} was {record_in_words(mine)}, and {record_in_words(theirs)} on the others"
    return Judgement(fault, tuple(odd), text, (at.place if fault is Fault.skipped else mine.place) or mine.place)


def _against_others(by_group: Mapping, members: Mapping[int, CommRecord], key: Callable) -> list[int]:
    """Return the ranks whose collective differs from the collective of the other groups with equal label and size.
    Return none if the other groups differ among themselves, or if all ranks of this group differ from the other groups.
    """
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


def _kind_of(mine: CommRecord, theirs: CommRecord) -> Fault:
    if mine.kind != theirs.kind:
        return Fault.other
    same_type, same_size = mine.dtype == theirs.dtype, (mine.sent, mine.received) == (theirs.sent, theirs.received)
    return Fault.resized if same_type else Fault.retyped if same_size else Fault.other


def _by_step(trace: RankTrace, record: CommRecord) -> dict[int, list[CommRecord]]:
    """Return the rank's records in the same channel as `record` (see `channel_of`), by step."""
    done, channel = defaultdict[int, list[CommRecord]](list), channel_of(record)
    for one in trace.records:
        if channel_of(one) == channel:
            done[one.step].append(one)
    return done


def _deviation(trace: RankTrace, record: CommRecord) -> tuple[Fault, CommRecord] | None:
    """Find how a rank's step differs, up to `record`, from the step one period earlier.

    Communication may repeat with a period of several steps, such as 10 if metrics are gathered every 10 steps. Returns
    None in these cases:

        - the two steps agree
        - no step of the current periodic pattern equals this step, but an older step does
        - no earlier step is known
    """
    # The ring may have lost the beginning of the first step.
    done, first = _by_step(trace, record), trace.records[0].step
    known, begin = {one.step for one in trace.records}, record.step
    while begin - 1 > first and begin - 1 in known:
        begin -= 1
    history = [_signatures(done[step]) for step in range(begin, record.step)]
    period, reach = _find_period(history)
    now = _signatures(one for one in done[record.step] if one.seq <= record.seq)
    alike = [now == past[: len(now)] for past in history]
    if any(alike) and not any(alike[len(history) - reach :]):
        return None
    return first_change(trace, record.step, done[record.step - period], done[record.step], record.seq)


def _find_period(history: Sequence[list[Signature]]) -> tuple[int, int]:
    """Return the period of a rank's communication in steps, and the number of last steps that repeat with this period.
    Without a period, return 1 and 0.

    At least two periods must repeat. The period that repeats over most steps is chosen.
    """
    numbers = dict[tuple, int]()
    kinds = [numbers.setdefault(tuple(one), len(numbers)) for one in reversed(history)]  # the last step comes first
    best = 1, 0
    for period in range(1, len(kinds) // 2 + 1):
        pairs = zip(kinds, kinds[period:], strict=False)
        again = next((at for at, (one, other) in enumerate(pairs) if one != other), len(kinds) - period)
        if again >= period and again + period > best[1]:
            best = period, again + period
    return best


def _against_other(
    trace: RankTrace, mine: CommRecord, other: RankTrace, theirs: CommRecord
) -> tuple[Fault, CommRecord] | None:
    """Find how a rank's step differs from a reference step.

    The reference is the newest earlier step of this rank that began like the step of the rank `other`. If there is
    none, the reference is the step of `other`.
    """
    done, right = _by_step(trace, mine), _by_step(other, theirs)[theirs.step]
    wanted = _signatures(one for one in right if one.seq <= theirs.seq)
    earlier = (done[step] for step in sorted(done, reverse=True) if step < mine.step)
    same = next((past for past in earlier if _signatures(past)[: len(wanted)] == wanted), right)
    return first_change(trace, mine.step, same, done[mine.step], mine.seq)


def _signatures(records: Iterable[CommRecord]) -> list[Signature]:
    return [(*_common(one), one.peer) for one in records]


def first_change(
    trace: RankTrace, step: int, before: list[CommRecord], now: list[CommRecord], until: int | None
) -> tuple[Fault, CommRecord] | None:
    """Return the first operation that differs between two steps of a rank, and how it differs.

    before, now: records of the two steps. until: sequence number of the last compared record of `now`, or None.
    """
    if not before or trace.records[0].step >= step - 1:  # the ring has lost the beginning of the earlier step
        return None

    def alike(one: CommRecord, other: CommRecord) -> bool:
        return _common(one) == _common(other) and one.peer == other.peer

    def matches(i: int, j: int) -> int:
        """Count the equal pairs (now[i], before[j]), (now[i + 1], before[j + 1]), ... up to the first unequal pair. A
        pair whose two records come from the same line of code counts twice."""
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
        swaps = i + 1 < min(len(now), len(before)) and alike(one, before[i + 1]) and alike(now[i + 1], before[i])
        swapped = min(2, matches(i, i + 1)) + min(2, matches(i + 1, i)) + matches(i + 2, i + 2) if swaps else 0
        later = next((j for j in range(i + 1, min(i + 4, len(before))) if alike(one, before[j])), None)
        skipped = matches(i, later) if later is not None else 0
        repeated = matches(i, i - 1) if i and alike(one, before[i - 1]) else 0
        if swapped and swapped >= max(skipped, repeated):
            return Fault.reordered, one
        if skipped and skipped >= repeated:
            return Fault.skipped, before[i]
        if repeated:
            return Fault.repeated, one
        return _kind_of(one, before[i]), one
    return None


def _odd_messages(traces: Mapping[int, RankTrace]) -> list[tuple[float, tuple[int, CommRecord, int, CommRecord]]]:
    """Return messages that differ in number or type of elements between sender and receiver, each with the later of its
    two start times."""
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
) -> Judgement:
    """Name the wrong rank of a message: its sender or its receiver."""
    changed = {
        rank: found
        for rank, record in ((sender, sent), (receiver, received))
        if (found := _deviation(traces[rank], record))
    }
    text = f"rank {sender} did {record_in_words(sent)}{_action_in_words(sent)}, and rank {receiver} {record_in_words(received)}{_action_in_words(received)}"
    if len(changed) != 1:
        return Judgement(
            Fault.unknown, (), f"{text}; which of them is wrong is unknown", received.place, among=(sender, receiver)
        )
    (rank, (fault, at)), *_ = changed.items()
    return Judgement(fault, (rank,), f"rank {rank} {fault.value}: {text}", at.place)


def _action_in_words(record: CommRecord) -> str:
    return f" in action {record.action}" if record.action else ""
