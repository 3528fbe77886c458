"""Runs the ranks of a run as child processes of one driver on this machine.

The peers of a failed rank fail too and often end first, so cluster/cause.py names the cause. The ranks find each other
through a file in a private folder, and communicate over loopback.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO

from cluster.cause import Cause, Kind, RankReport, name_cause, read_report
from cluster.clocks import HeldUp
from cluster.comm_ring import RankTrace, read_traces
from cluster.incident import describe_incident, judge_failure, judge_hang, keep_incident, tell_went_on, warning_of
from cluster.interrupts import handled
from cluster.judgement import Judgement
from cluster.patience import Patience
from cluster.private_folder import PrivateFolder
from cluster.rank_differences import find_difference
from cluster.rank_watch import RankWatch
from cluster.run_files import AT_WORK, FAILURES, PROGRESS, RINGS, log_path
from cluster.spawn import ForkedProcess, spawn
from cluster.stacks import gather_stacks
from conf.errors import EXIT_STOPPED
from conf.files import open_plain
from conf.words import say

SETTLE = 3.0
"""Seconds to wait for other ranks' reports after the first failure."""
STACKS_SECONDS = 5.0
"""Seconds to wait for the stacks of hung ranks."""
DIFFERENCE_SECONDS = 15.0
"""Seconds after which the driver compares the ranks' communication again."""
RANKS_LOOK_SECONDS = 0.05
"""Seconds after which the driver checks the ranks again."""
Child = subprocess.Popen | ForkedProcess
StartRank = Callable[[dict[str, str], IO | None], Child]
"""Starts a rank with these environment variables. The second argument is the file for its output; None for the
terminal."""
CLOSE = 60.0
"""Maximum seconds for ranks to end by themselves after a failure."""


def run_local(command: list[str], world: int, logs: Path, patience: Patience | None = None) -> int:
    """Run `world` ranks, each started by this command; see `run_children`."""
    return run_children(partial(spawn, command), world, logs, patience)


def run_children(start: StartRank, world: int, logs: Path, patience: Patience | None = None) -> int:
    """Start `world` ranks and wait until all have ended. Returns the exit code of the run.

    The driver ends all ranks when one fails, or when they report no progress for longer than `patience` allows. It
    passes SIGTERM or Ctrl-C to the ranks as SIGTERM. A second Ctrl-C ends them at once.
    """
    logs.mkdir(parents=True, exist_ok=True)
    _remove(logs, FAILURES, AT_WORK, PROGRESS, RINGS)
    with PrivateFolder("sluice-store-") as folder:
        code = _run(start, world, logs, folder.path / "store", patience)
    if code == EXIT_STOPPED:  # ranks that stopped on request have not failed
        _remove(logs, FAILURES)
    return code


def _remove(logs: Path, *patterns: str) -> None:
    for path in [path for pattern in patterns for path in logs.glob(pattern)]:
        path.unlink(missing_ok=True)


def _run(start: StartRank, world: int, logs: Path, store: Path, patience: Patience | None) -> int:
    ranks: list[Child] = []
    asked: list[int] = []
    """Signals that asked the run to stop."""

    def take(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # a rank in this process does the same at a second Ctrl-C, see train/loop/stop.py
        asked.append(number)
        _forward(ranks)

    try:
        with handled(take, signal.SIGTERM, signal.SIGINT):
            _start(ranks, start, world, logs, store)
            if asked:  # some ranks had not started when the signal arrived
                _forward(ranks)
            return _watch(ranks, logs, asked, patience)
    finally:
        _end(ranks)


def _start(ranks: list[Child], start: StartRank, world: int, logs: Path, store: Path) -> None:
    """Start the ranks one by one and append each to `ranks`."""
    environment = os.environ | {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "SLUICE_STORE": str(store),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", "lo"),
    }
    for rank in range(world):
        # Rank 0 uses the terminal, because it draws the progress. The others write to their logs.
        output = None if rank == 0 else open(log_path(logs, rank), "w", opener=open_plain)  # noqa: SIM115
        ranks.append(start(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, output))
        if output:
            output.close()


def _watch(ranks: list[Child], logs: Path, asked: list[int], patience: Patience | None) -> int:
    now = time.monotonic()
    held_up = HeldUp(2 * RANKS_LOOK_SECONDS, now)
    watch = RankWatch(range(len(ranks)), {}, patience, now) if patience is not None else None
    look_at, reported = now + DIFFERENCE_SECONDS, False
    while True:
        reports, now = _reports(ranks, logs), time.monotonic()
        if any(report.bad for report in reports):
            return _explain(ranks, logs, asked)
        codes = [report.code for report in reports if report.code is not None]
        if len(codes) == len(reports):
            if watch is not None and (seconds := watch.over(now)) is not None:
                tell_went_on(logs, seconds)
            if watch is not None and not reported:
                _tell_difference(logs)
            return max(codes)
        if asked and EXIT_STOPPED in codes and all(report.step < 0 for report in reports):
            _wait(ranks, SETTLE)
            # A rank that waits inside a library for an ended rank handles no signal.
            if any(rank.poll() is None for rank in ranks):
                return _stopped_early()
            continue
        if watch is not None:
            watch.forgive(now, held_up.since_last_look(now))
            watch.take(now, reports)
            # A run is never hung before its first step, because data preparation may take hours.
            if watch.first_step is not None and watch.is_hung(now):
                return _show(_name_hang(ranks, logs, now - watch.silent_since), ranks, logs)
            if watch.first_step is not None and watch.is_late(now):
                _warn(ranks, logs, watch, now)
                # The time for collecting stacks does not count against the ranks.
                held_up.since_last_look(time.monotonic())
            elif (seconds := watch.went_on()) is not None:
                tell_went_on(logs, seconds)
            elif text := watch.tell_quiet(now):
                say(text, file=sys.stderr)
            if now >= look_at and not reported:
                reported, look_at = _tell_difference(logs), now + DIFFERENCE_SECONDS
        time.sleep(RANKS_LOOK_SECONDS)


def _warn(ranks: list[Child], logs: Path, watch: RankWatch, now: float) -> None:
    """Warn about the ranks that block a run, after it was silent for too long. The run continues."""
    watch.name_late()
    traces, stacks, seconds = read_traces(logs), _stacks(ranks, logs), now - watch.silent_since
    cause, finding = judge_hang(_reports(ranks, logs), traces, stacks, {}, seconds)
    say(f"warning: {warning_of(cause.text, watch.seconds_left(time.monotonic()))}", file=sys.stderr)
    if traces:
        incident = describe_incident(cause, finding, traces, stacks, seconds, live=True)
        say(keep_incident(logs, incident, partial(say, file=sys.stderr), reported=True), file=sys.stderr)


def _name_hang(ranks: list[Child], logs: Path, seconds: float) -> Cause:
    """Name the hung ranks, from all ranks' communication and stacks."""
    traces, stacks, reports = read_traces(logs), _stacks(ranks, logs, native=True), _reports(ranks, logs)
    cause, finding = judge_hang(reports, traces, stacks, {}, seconds)
    return _keep(logs, cause, finding, traces, stacks, seconds)


def _name_failure(ranks: list[Child], logs: Path, cause: Cause) -> Cause:
    """Name the rank that made another rank fail."""
    if not (traces := read_traces(logs)):
        return cause
    stacks = _stacks(ranks, logs)
    cause, finding = judge_failure(cause, traces, stacks, {})
    return _keep(logs, cause, finding, traces, stacks)


def _tell_difference(logs: Path) -> bool:
    """Print an incident and return True if the ranks' communication differs."""
    traces = read_traces(logs)
    if (finding := find_difference(traces)) is None:
        return False
    step = min(trace.step for trace in traces.values())
    text = f"the numbers of this run are wrong since step {step} or earlier: {finding.text}"
    cause = Cause(Kind.crash, text, finding.ranks)
    say(_keep(logs, cause, finding, traces, {}).log, file=sys.stderr)
    return True


def _keep(
    logs: Path,
    cause: Cause,
    finding: Judgement,
    traces: dict[int, RankTrace],
    stacks: dict[int, str],
    seconds: float = 0.0,
) -> Cause:
    """Write the incident to disk. Returns `cause` with the text of the incident appended to `Cause.log`.

    For wrong input, or without recorded communication, writes nothing and returns `cause` unchanged.
    """
    if not traces or cause.kind is Kind.user:
        return cause
    incident = describe_incident(cause, finding, traces, stacks, seconds)
    screen = keep_incident(logs, incident, partial(say, file=sys.stderr), reported=True)
    return replace(cause, log=f"{cause.log.rstrip()}\n{screen}".strip())


def _stacks(ranks: list[Child], logs: Path, native: bool = False) -> dict[int, str]:
    """Return the stacks of the living ranks that answer."""
    alive = {rank: child.pid for rank, child in enumerate(ranks) if child.poll() is None}
    return gather_stacks(logs, alive, STACKS_SECONDS, native)


def _reports(ranks: list[Child], logs: Path) -> list[RankReport]:
    reports = [read_report(number, rank.poll(), logs, rank.pid) for number, rank in enumerate(ranks)]
    reports[0].log_tail = None  # an existing log of rank 0 belongs to an earlier run
    return reports


def _explain(ranks: list[Child], logs: Path, asked: list[int]) -> int:
    """Name the cause when the other ranks have had time to report. Returns the exit code."""
    _wait(ranks, SETTLE)
    reports = _reports(ranks, logs)
    cause = name_cause(reports, {})
    assert cause is not None, "a rank has failed"
    if asked and cause.kind is Kind.killed and all(reports[rank].code == -signal.SIGTERM for rank in cause.ranks):
        # During its imports and at its end, a rank does not handle the signal and dies. Then neither this rank nor its
        # peers have failed.
        say(
            f"stopped: ranks {list(cause.ranks)} were outside the training loop and were ended at once", file=sys.stderr
        )
        return EXIT_STOPPED
    if asked and any(report.code == EXIT_STOPPED for report in reports):
        return _stopped_early()
    return _show(_name_failure(ranks, logs, cause), ranks, logs)


def _stopped_early() -> int:
    say("stopped: some ranks had not completed a step and were ended at once", file=sys.stderr)
    return EXIT_STOPPED


def _show(cause: Cause, ranks: list[Child], logs: Path) -> int:
    """Print the cause, and let the ranks end by themselves. Returns the exit code."""
    say(f"error: {cause.text}", file=sys.stderr)
    if cause.kind is not Kind.user:
        if cause.log.strip() not in cause.text:
            say(cause.log.strip(), file=sys.stderr)
        if others := sorted(set(range(len(ranks))) - set(cause.ranks)):
            say(f"  also ended: ranks {others}", file=sys.stderr)
        say(f"  logs: {logs}", file=sys.stderr)
        running = [rank for rank, child in enumerate(ranks) if child.poll() is None]
        if running and cause.kind is not Kind.hang:
            say(f"  ranks {running} get {CLOSE:.0f} s to close their files", file=sys.stderr)
            _wait(ranks, CLOSE)
    return cause.code


def _wait(ranks: list[Child], seconds: float) -> None:
    """Wait at most `seconds` until all ranks have ended. Delays of this process do not count."""
    now = time.monotonic()
    ends, held_up = now + seconds, HeldUp(2 * RANKS_LOOK_SECONDS, now)
    while now < ends and any(rank.poll() is None for rank in ranks):
        time.sleep(RANKS_LOOK_SECONDS)
        now = time.monotonic()
        ends += held_up.since_last_look(now)


def _forward(ranks: list[Child]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signal.SIGTERM)


def _end(ranks: list[Child]) -> None:
    """Kill all remaining children."""
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
    for rank in ranks:
        rank.wait()
