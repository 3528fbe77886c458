"""`sluice why NAME [runs=FOLDER] [--json]`: explains why a run failed or hangs.

The command names the rank that caused the problem, and shows in which operation
and at which place in the code this rank is. It also names the ranks that wait
for this rank, and since when they wait. If the ranks run on this machine, the
command reads the last operations and the stacks of all ranks, without stopping
any rank. If the run has ended, or if its ranks are on other machines, the
command shows the newest logs/incident_N.json.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.cause import Cause, Kind, RankReport, read_report
from cluster.comm_ring import RankTrace, living_ranks, read_traces
from cluster.compare_ranks import PROGRESS_SECONDS
from cluster.driver.journal import read_events
from cluster.incident import describe_incident, incident_screen, judge_hang, newest_incident
from cluster.spawn import is_stopped
from cluster.stacks import gather_stacks
from conf.errors import EXIT_OK, UserError
from conf.load import reported
from conf.words import say, say_folded
from train.checkpoint.run_folder import is_held
from train.command.command_words import sort_words

ASKED_SECONDS = 3.0
"""Time limit in seconds for the ranks' reports of their stacks."""


@reported
def main(words: Sequence[str]) -> int:
    """Run `sluice why` with these arguments; returns the exit code."""
    given = sort_words("sluice why", words)
    name = given.one_run()
    folder = given.runs / name
    if not folder.is_dir():
        rule = f"there is no run in {folder}"
        raise UserError(given.command, name, rule, "`sluice runs` lists them; `runs=FOLDER` looks in another folder")
    tell = _tell_as_json if given.flags else _tell
    tell(folder)
    return EXIT_OK


def _tell_as_json(folder: Path) -> None:
    if traces := alive_traces(folder / "logs"):
        say(json.dumps(look_at(folder / "logs", traces), indent=1))
    else:
        found = newest_incident(folder / "logs")
        say(json.dumps(found[1] if found else None, indent=1))


def _show(text: str) -> None:
    say_folded(text, 11)  # the values of an incident screen are indented by 11


def _tell(folder: Path) -> None:
    logs = folder / "logs"
    if traces := alive_traces(logs):
        silent = time.time() - last_news(traces)
        if silent < PROGRESS_SECONDS:
            steps = sorted({trace.step for trace in traces.values()})
            _show(
                f"{folder.name} makes progress: {len(traces)} ranks, step {steps[-1]}, last progress {silent:.1f} s ago"
            )
        else:
            _show(f"{folder.name} has made no progress for {silent:.1f} s\n{incident_screen(look_at(logs, traces))}")
        return
    found = newest_incident(logs)
    held = is_held(folder)
    if held:
        _show(f"{folder.name} runs on other machines: its driver compares the ranks when they hang or fail")
    if found is None:
        last = next((event for event in reversed(read_events(folder)) if event["kind"] == "failure"), None)
        _show(f"the last failure: {last['text']}" if last else f"{folder.name} has had no failure so far")
        return
    path, incident = found
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(incident["time"]))
    _show(f"{folder.name}, {when}\n{incident_screen(incident, path)}")


def alive_traces(logs: Path) -> dict[int, RankTrace]:
    """Returns the recorded communication of all ranks; empty if no rank is alive on this machine."""
    traces = read_traces(logs)
    return traces if living_ranks(logs, traces) else {}


def last_news(traces: dict[int, RankTrace]) -> float:
    """Returns the Unix time of the last action on any rank."""
    return max(
        max(trace.since, *(max(record.began, record.ended) for record in trace.records[-50:]), 0.0)
        for trace in traces.values()
    )


def look_at(logs: Path, traces: dict[int, RankTrace]) -> dict[str, Any]:
    """Returns a local run's state in the form of an incident file."""
    here = living_ranks(logs, traces)
    reports = [
        RankReport(
            rank,
            None if rank in here else 1,
            step=read_report(rank, None, logs).step,
            state="T" if rank in here and is_stopped(here[rank]) else "",
        )
        for rank in traces
    ]
    stacks = gather_stacks(logs, here, ASKED_SECONDS, native=True)
    if gone := [each.rank for each in reports if each.ended]:
        text = f"ranks {gone} have ended, and the others have not yet noticed"
        cause, finding = judge_hang(reports, traces, stacks, {}, time.time() - last_news(traces))
        cause = Cause(Kind.killed, text, tuple(gone)) if not finding.ranks else cause
        return describe_incident(cause, finding, traces, stacks, live=True)
    seconds = time.time() - last_news(traces)
    cause, finding = judge_hang(reports, traces, stacks, {}, seconds)
    return describe_incident(cause, finding, traces, stacks, seconds, live=True)
