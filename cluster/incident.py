"""Describes an incident of a run: the rank that broke or blocks it, the place in the code, waiting ranks, and advice.

cluster/cause.py names the cause from failure reports. cluster/compare_ranks.py may find a better cause, such as a rank
that skipped a collective and so made another rank fail. logs/incident_N.json contains:

    time, kind, text     Unix time; kind of the cause; sentence about the cause
    fault                kind of fault; see judgement.Fault
    ranks                the ranks that caused the fault
    among                if `ranks` is unknown: the ranks that may have caused the fault
    where, advice        file and line; what to do
    seconds              for a hang: seconds since the last news
    waits                [{"rank": 0, "for": [1], "what": "all_reduce 7 of ...", "place": "file:line", "seconds": 12.1},
                         ...]
    by_rank              for each rank: step, phase, action, layer, process, stack and its last records
"""

import json
import math
import re
import signal
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.cause import CERTAIN, NATIVE_HEAD, Cause, Kind, RankReport, innermost, name_hang, waits_for_ranks
from cluster.comm_ring import CommRecord, RankTrace, read_trace
from cluster.compare_ranks import compare_ranks
from cluster.judgement import Fault, Judgement, name_record
from cluster.rank_differences import find_difference
from cluster.run_files import LATEST
from conf.disk import explain_disk_error, naming
from conf.errors import EXIT_CRASH
from conf.files import atomic_write_text, read_plain_json
from conf.words import one_line, say, steps_in_words

INCIDENT = re.compile(r"incident_(\d{1,9})\.json")
_CONSEQUENCE = re.compile(r"\n  (?:consequence|what failed of it): ")
"""Matches the label before the consequence in the `text` of an incident. Earlier versions wrote "what failed of it"
as the label."""
SHOWN_RECORDS = 40
"""Number of newest records that the file stores for each rank."""
SHOWN_WAITS, LINE = 6, 400
"""Maximum waiting ranks on the screen, and characters of a sentence."""
ADVICE_OF_CAUSE = {
    Kind.killed: "check the log of this rank, dmesg and its device",
    Kind.crash: "see the lines above, from the first rank that failed",
    Kind.diverged: "check the named data and weights",
    Kind.node: "check the node: power, network, system logs",
}


def judge_hang(
    reports: Sequence[RankReport],
    traces: Mapping[int, RankTrace],
    stacks: dict[int, str],
    names: dict[int, str],
    seconds: float,
) -> tuple[Cause, Judgement]:
    """Name the rank that blocks a run after `seconds` without news. names: node of each rank, if known."""
    by_stacks = name_hang(list(reports), stacks, names, seconds)
    if not traces and len(reports) == 1 and reports[0].rank in stacks:
        return _judge_alone(reports[0], stacks[reports[0].rank], seconds)
    if not traces:
        fault = Fault.stopped if any(report.state == "T" for report in reports) else Fault.absent
        known = by_stacks.ranks if 0 < len(by_stacks.ranks) < len(reports) else ()
        return by_stacks, Judgement(fault if known else Fault.unknown, known, by_stacks.text)
    stopped = [report.rank for report in reports if report.state == "T"]
    finding = compare_ranks(traces, stacks, stopped, [report.rank for report in reports if report.ended])
    if finding.fault is Fault.unknown and not finding.among:
        return by_stacks, finding
    steps = steps_in_words([report.step for report in reports])
    text = f"no step finished for {seconds:.0f} s ({steps}): {_on_nodes(finding, names)}"
    nodes = tuple(sorted({names[rank] for rank in finding.ranks if rank in names}))
    ranks = finding.ranks or tuple(sorted(traces))
    return Cause(Kind.hang, text, ranks, nodes, EXIT_CRASH, by_stacks.log), finding


def _judge_alone(report: RankReport, stack: str, seconds: float) -> tuple[Cause, Judgement]:
    """Judge a hung rank without data about the other ranks."""
    waits = waits_for_ranks(stack)
    what = "waits for other ranks" if waits else "is not in a collective"
    text = f"no step finished for {seconds:.0f} s: rank {report.rank} in step {report.step} {what}{innermost(stack)}"
    finding = Judgement(Fault.unknown if waits else Fault.absent, () if waits else (report.rank,), text)
    return Cause(Kind.hang, text, (report.rank,), (), EXIT_CRASH, stack.partition(NATIVE_HEAD)[0]), finding


def judge_failure(
    cause: Cause, traces: Mapping[int, RankTrace], stacks: Mapping[int, str], names: dict[int, str]
) -> tuple[Cause, Judgement]:
    """Return the reported cause, or a better cause from recorded communication."""
    finding = None
    if cause.kind is Kind.hang and traces:  # the ranks gave up waiting; the rings show what each rank did
        finding = compare_ranks(traces, stacks)
    elif cause.kind in (Kind.crash, Kind.killed) and not _is_certain(cause):
        finding = find_difference(traces)
    if finding is None or not finding.ranks:
        return cause, finding or Judgement(Fault.failed, cause.ranks, cause.text)
    nodes = tuple(sorted({names[rank] for rank in finding.ranks if rank in names}))
    text = f"{_on_nodes(finding, names)}\n  consequence: {cause.text.splitlines()[0]}"
    return replace(cause, text=text, ranks=finding.ranks, nodes=nodes), finding


def _is_certain(cause: Cause) -> bool:
    """Whether the way in which the rank ended proves that no other rank made it fail."""
    return any(signal.Signals(-code).name in cause.text for code in CERTAIN)


def _on_nodes(finding: Judgement, names: dict[int, str]) -> str:
    where = sorted({names[rank] for rank in finding.ranks if rank in names})
    return finding.text + (f" (on {', '.join(where)})" if where else "")


def describe_incident(
    cause: Cause,
    finding: Judgement,
    traces: Mapping[int, RankTrace],
    stacks: Mapping[int, str],
    seconds: float = 0.0,
    live: bool = False,
) -> dict[str, Any]:
    """Return the incident in its file format. live: whether the ranks still run."""
    now = time.time()
    waits = [
        {
            "rank": wait.rank,
            "for": list(wait.missing),
            "what": name_record(wait.record),
            "place": wait.record.place,
            "seconds": round(now - wait.record.waited, 3),
        }
        for wait in finding.waits
    ]
    by_rank = {str(rank): _rank(trace, stacks.get(rank, ""), now) for rank, trace in sorted(traces.items())}
    advice = finding.advice
    if finding.fault is Fault.failed:
        advice = cause.advice or ADVICE_OF_CAUSE.get(cause.kind, advice)
    elif finding.fault is Fault.stopped and live:
        advice += (
            f"; `kill -CONT {' '.join(str(traces[rank].pid) for rank in finding.ranks if rank in traces)}` resumes it"
        )
    return {
        "time": now,
        "kind": cause.kind.name,
        "text": cause.text,
        "fault": finding.fault.name,
        "ranks": list(finding.ranks if finding.ranks or finding.among else cause.ranks),
        "among": list(finding.among),
        "where": finding.where,
        "advice": advice,
        "seconds": round(seconds, 3),
        "waits": waits,
        "by_rank": by_rank,
    }


def _rank(trace: RankTrace, stack: str, now: float) -> dict[str, Any]:
    return {
        "step": trace.step,
        "phase": trace.phase,
        "action": trace.action,
        "layer": trace.layer,
        "seconds": round(now - trace.since, 3),
        "process": trace.pid,
        "stack": stack,
        "records": [_plain(record) for record in trace.records[-SHOWN_RECORDS:]],
    }


def _plain(record: CommRecord) -> dict[str, Any]:
    return record._asdict() | {"group": {"label": record.group.label, "ranks": list(record.group.ranks)}}


def write_incident(logs: Path, incident: dict[str, Any]) -> Path:
    """Write the incident to the next incident_N.json. Raises OSError."""
    number = 1 + max(
        (int(found[1]) for path in incident_files(logs) if (found := INCIDENT.fullmatch(path.name))), default=0
    )
    path = logs / f"incident_{number}.json"
    with naming(path):
        atomic_write_text(path, json.dumps(incident), durable=False)
    return path


def keep_incident(logs: Path, incident: dict[str, Any], note: Callable[[str], None], reported: bool = False) -> str:
    """Write an incident and return its screen (see `incident_screen`). On a disk error, call `note` with the reason."""
    path = None
    try:
        path = write_incident(logs, incident)
    except OSError as error:
        note(f"the incident could not be written ({explain_disk_error(error)})")
    return incident_screen(incident, path, reported)


def newest_incident(logs: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the last incident of a run, or None."""
    for path in reversed(incident_files(logs)):
        with suppress(OSError, ValueError):
            return path, read_incident(path)
    return None


def incident_files(logs: Path) -> list[Path]:
    """Return all files incident_*.json, the newest last, without checks."""
    found = list[tuple[float, Path]]()
    for path in logs.glob("incident_*.json"):
        with suppress(OSError):  # the file is gone
            found.append((path.lstat().st_mtime, path))
    return [path for _, path in sorted(found)]


def read_incident(path: Path) -> dict[str, Any]:
    """Read an untrusted incident file. Raises OSError, and ValueError for wrong content."""
    found = read_plain_json(path)
    if not isinstance(found, dict) or not all(
        name in found and fits(found[name]) for name, fits in INCIDENT_FIELDS.items()
    ):
        raise ValueError(f"{path} is not an incident file")
    return found


def _is_time(found: Any) -> bool:
    return isinstance(found, int | float) and 0 <= found < LATEST


def _is_text(found: Any) -> bool:
    return isinstance(found, str)


def _are_ranks(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(rank, int) for rank in found)


def _is_wait(found: Any) -> bool:
    match found:
        case {"rank": int(), "for": ranks, "what": str(), "place": str(), "seconds": int() | float() as seconds}:
            return _are_ranks(ranks) and math.isfinite(seconds)
    return False


INCIDENT_FIELDS: dict[str, Callable[[Any], bool]] = {
    "time": _is_time, "kind": _is_text, "text": _is_text, "fault": _is_text, "ranks": _are_ranks, "among": _are_ranks, "where": _is_text,
    "advice": _is_text, "waits": lambda found: isinstance(found, list) and all(map(_is_wait, found)),
}  # fmt: skip
"""Required fields of an incident, with a check of each value."""


def incident_screen(incident: Mapping[str, Any], path: Path | None = None, reported: bool = False) -> str:
    """Return text about the incident for one screen. reported: whether to omit text that a rank has already printed."""
    ranks, among = incident["ranks"], incident["among"]
    who = ", ".join(map(str, ranks)) or (f"one of {', '.join(map(str, among[:8]))}" if among else "not known")
    head = [one_line(part.strip().partition("\n")[0])[:LINE] for part in _CONSEQUENCE.split(incident["text"])]
    lines = [f"culprit: {'ranks' if len(ranks) > 1 else 'rank'} {who}" if ranks else f"culprit: {who}"]
    if not (reported and incident["fault"] == Fault.failed.name):
        lines.append(f"  what:    {head[0]}")
    lines += [f"  result:  {rest}" for rest in head[1:]]
    if incident["where"]:
        lines.append(f"  where:   {one_line(incident['where'])}")
    for number, wait in enumerate(incident["waits"][:SHOWN_WAITS]):
        missing = f"for {', '.join(map(str, wait['for'][:8]))}" if wait["for"] else "though all ranks have entered"
        what, place = one_line(wait["what"]), one_line(f" ({wait['place']})" if wait["place"] else "")
        lines.append(
            f"  {'waits:  ' if number == 0 else '        '} rank {wait['rank']} {missing}, {wait['seconds']:.0f} s, in {what}{place}"
        )
    if (more := len(incident["waits"]) - SHOWN_WAITS) > 0:
        lines.append(f"           and {more} more")
    lines.append(f"  to do:   {one_line(incident['advice'])}")
    if path is not None:
        lines.append(f"  whole:   {one_line(path)}")
    return "\n".join(lines)


def unpack_traces(rings: Mapping[int, bytes]) -> dict[int, RankTrace]:
    """Parse the communication rings that agents sent."""
    traces = dict[int, RankTrace]()
    for rank, packed in rings.items():
        with suppress(ValueError, zlib.error):
            traces[rank] = read_trace(zlib.decompress(packed))
    return traces


# If a run is silent for too long, its incident is shown as a warning. If the run makes progress again, `pass_incident`
# records this in the incident's file.

PASSED = "passed"
"""Kind of an incident after which the run made progress again. Until then, the kind is hang."""


def warning_of(text: str, seconds_left: float) -> str:
    """Return the warning about the ranks that block a run. text: sentence about these ranks."""
    return f"{text}; the run is ended in {seconds_left:.0f} s without progress (cluster.kill_after)"


def pass_incident(logs: Path, seconds: float) -> None:
    """Record in the newest incident that the run continued. Raises OSError."""
    if (found := newest_incident(logs)) is not None and found[1].get("kind") == "hang":
        path, incident = found
        text = f"{str(incident['text']).splitlines()[0]}; the run went on after {seconds:.0f} s"
        atomic_write_text(path, json.dumps(incident | {"kind": PASSED, "text": text}), durable=False)


def tell_went_on(logs: Path, seconds: float) -> None:
    """Print and record that a run makes progress again after a warning."""
    say(f"the run makes progress again after {seconds:.0f} s", file=sys.stderr)
    with suppress(OSError):  # the disk is full; the message above is enough
        pass_incident(logs, seconds)
