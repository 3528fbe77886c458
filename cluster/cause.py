"""Names the rank that broke a run.

When a rank fails, its peers lose their connection to it or time out. These victims fail too, and often report first.
The first case that applies names the cause:

    1. A rank had wrong input (exit code 2).
    2. A node no longer answers.
    3. A rank vanished without a report: it was killed, crashed in native code, or exited early. A victim would have
       had time to report.
    4. Ranks are silent while the others timed out in a collective. The silent ranks hang.
    5. Otherwise, the rank with the earliest error, by the hosts' uptime clocks, is named. If this error blames other
       ranks, they are named: the ranks with the non-finite loss, or without their part of a checkpoint.
"""

import contextlib
import json
import math
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

from cluster.run_files import at_work_path, failure_path, log_path, progress_path, read_counts
from cluster.spawn import is_stopped, waited_for_core
from conf.disk import naming
from conf.errors import EXIT_CRASH, EXIT_DIVERGED, EXIT_OK, EXIT_STOPPED, EXIT_USER
from conf.files import atomic_write_text, open_plain, read_plain_json, read_tail
from conf.words import steps_in_words

CERTAIN = {-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE}
"""Exit codes that prove that no other rank made this rank fail. Libraries raise SIGABRT when they lose a peer."""
NCCL_TIMEOUT = "Watchdog caught collective operation timeout"
"""Text of torch before it aborts a rank that waited too long in a GPU collective."""
OUTPUT_TAIL = 4 << 10
"""Maximum bytes of output kept of a rank without a report."""
LAST_WORDS_BYTES = 64 << 10
"""Bytes that a rank reserves for its report on a full disk."""
NEWS_BYTES = 16 << 20
"""Maximum bytes read from a file of a rank's state."""
SAID = 4 << 10
"""Maximum characters of headline and of message in a shortened report."""
CURES_OF_SIGNALS: dict[int, str] = {
    signal.SIGKILL: "look at dmesg for the kernel's out-of-memory kills (lower micro_batch_size or model.loss_chunk if memory is short); "
    "otherwise a person, a job scheduler or a container runtime sent SIGKILL",
    signal.SIGSEGV: "native code accessed invalid memory: dmesg names the library; check recently installed or built packages",
    signal.SIGBUS: "a memory-mapped file could not be read, or its disk is full: see `df` for /dev/shm and the disks, and  "
    "dmesg for disk and memory errors",
    signal.SIGILL: "a library uses instructions that this processor lacks: compare `lscpu` with the machine for which the library was built",
    signal.SIGFPE: "native code divided an integer by zero: dmesg names the library",
    signal.SIGABRT: "a library aborted the process: see the last lines of the rank's log",
}
CURE_OF_OTHER_SIGNALS = "find the sender of the signal, a person or a job scheduler; to stop a run, send the signal to the command that started the run"
CURE_OF_EXITS = (
    "find the code that ends the process with this exit code: custom code, or a library that calls `exit` or `os._exit`"
)


class Kind(Enum):
    """Kind of failure that ended an attempt. Each kind has its own failure budget."""

    user = "bad input"
    node = "node lost"
    killed = "rank killed"
    crash = "rank error"
    hang = "hang"
    diverged = "loss not finite"
    start = "failed start"


@dataclass
class Failure:
    """The report of a failed rank, which the driver reads."""

    rank: int
    time: float
    """Seconds since the host's start (`cluster.clocks.uptime`); the agent converts them to Unix time."""
    kind: str
    """Kind of failure, one of: user, timeout, stopped, crash."""
    message: str
    """Sluice's error screen, or the traceback of the first error."""
    code: int
    ranks: list[int] = field(default_factory=list)
    """Ranks where the failure began; empty if unknown."""
    headline: str = ""
    """The failure in one line; empty if `message` has it."""
    whole: str = ""
    """The tracebacks of the first error and of all errors that followed; empty if no error followed."""

    def write(self, logs: Path) -> None:
        """Write the report. On a full disk, a shortened report uses the space that `begin_work` reserved. Raises
        OSError.
        """
        logs.mkdir(parents=True, exist_ok=True)
        path = failure_path(logs, self.rank)
        try:
            atomic_write_text(path, json.dumps(self.__dict__), durable=False)
        except OSError:
            short = replace(self, message=self.message[-SAID:], headline=self.headline[:SAID], whole="")
            with open(at_work_path(logs, self.rank), "r+b", buffering=0, opener=open_plain) as file:
                file.truncate(file.write(json.dumps(short.__dict__).encode()))
            at_work_path(logs, self.rank).rename(path)


def begin_work(logs: Path, rank: int) -> None:
    """Write the file that marks a working rank. Raises OSError."""
    logs.mkdir(parents=True, exist_ok=True)
    path = at_work_path(logs, rank)
    with naming(path, LAST_WORDS_BYTES), open(path, "wb", opener=open_plain) as file:
        file.write(b" " * LAST_WORDS_BYTES)


def end_work(logs: Path, rank: int) -> None:
    """Remove the file that marks a working rank. Raises OSError."""
    at_work_path(logs, rank).unlink(missing_ok=True)


@dataclass
class RankReport:
    """State of one rank, from its agent or the local driver."""

    rank: int
    code: int | None = None
    """Exit code, or the negative number of a signal; None while the rank runs."""
    failure: Failure | None = None
    """The report that the rank wrote before it failed."""
    step: int = -1
    """Optimizer step of the rank, from 1; -1 before the loop."""
    phase: str = "start"
    """Phase: start, step, validation, checkpoint, or a callback's hook."""
    busy: float | None = None
    """Seconds of the last step, not counting its waits for other ranks; None if unknown."""
    seconds: float | None = None
    """Seconds of the last step, including the waits for other ranks."""
    memory: int = 0
    """Peak memory in bytes of the rank's device (CPU: its process), or 0."""
    sequences: float = 0.0
    """Sequences in the current step, over all ranks, or 0."""
    on_gpu: bool = False
    done: int = 0
    """Number of completed work units (cluster/comm_ring.py), which shows progress."""
    written: int = 0
    """Bytes of checkpoints that the rank has written so far."""
    waited_for_core: float = 0.0
    """Seconds in which the rank was ready but had no CPU core."""
    state: str = ""
    """Letter of the process state of Linux; T means stopped."""
    log_tail: str | None = ""
    """Last lines of a failed rank's output; None if the driver's terminal has them."""
    deserted: bool = False
    """Whether the rank ended before its work was complete, with an exit code that Sluice did not choose."""

    @property
    def ended(self) -> bool:
        return self.code is not None

    @property
    def bad(self) -> bool:
        """Whether the rank failed. A stop on request is no failure."""
        if self.failure is not None:
            return self.failure.code != EXIT_STOPPED
        return self.deserted or self.code not in (None, EXIT_OK, EXIT_STOPPED)

    @property
    def said(self) -> int | None:
        """The exit code in the rank's failure report, else of its process. None if the rank runs or is `deserted`."""
        return None if self.deserted else self.failure.code if self.failure else self.code

    @property
    def certain(self) -> bool:
        """Whether the way in which the rank ended proves that no other rank made it fail."""
        return self.code is not None and (self.code in CERTAIN or (self.deserted and self.code >= 0))


def read_report(rank: int, code: int | None, logs: Path, pid: int | None = None) -> RankReport:
    """Read the files that a rank left in its folder.

    code: exit code, read before this call because a rank may write until it ends; None while it runs. pid: process id
    on this machine.
    """
    report = RankReport(rank, code)
    if pid is not None and code is None:
        report.waited_for_core = waited_for_core(pid)
        report.state = "T" if is_stopped(pid) else ""
    with contextlib.suppress(OSError, ValueError):  # missing before the loop; may be incomplete on a full disk
        match read_plain_json(progress_path(logs, rank), NEWS_BYTES):
            case {"step": int(step), "phase": str(phase), **more}:
                report.step, report.phase = step, phase
                report.busy, report.seconds = (_number(more.get(name)) for name in ("busy", "seconds"))
                report.sequences, report.memory = (_number(more.get(name)) or 0 for name in ("sequences", "memory"))
                report.on_gpu = more.get("on_gpu") is True
    report.done, report.written = read_counts(logs, rank)
    with contextlib.suppress(OSError, ValueError):  # a rank that did not fail wrote none
        report.failure = _failure(read_plain_json(failure_path(logs, rank), NEWS_BYTES))
    report.deserted = code is not None and report.failure is None and at_work_path(logs, rank).exists()
    if report.bad and report.failure is None:
        report.log_tail = read_tail(log_path(logs, rank), OUTPUT_TAIL).decode(errors="replace")
    return report


def _number(found: Any) -> Any:
    return found if isinstance(found, int | float) and math.isfinite(found) else None


def _failure(found: Any) -> Failure | None:
    """Return `found` as a Failure; None if it does not have the format of a Failure."""
    match found:
        case {
            "rank": int(),
            "time": int() | float(),
            "kind": str(),
            "message": str(),
            "code": int(),
            "ranks": [*ranks],
        }:
            words = all(isinstance(found.get(name, ""), str) for name in ("headline", "whole"))
            known = found.keys() <= {each.name for each in fields(Failure)}
            return Failure(**found) if words and known and all(isinstance(rank, int) for rank in ranks) else None
    return None


@dataclass(frozen=True)
class Cause:
    """The first failure of an attempt."""

    kind: Kind
    text: str
    ranks: tuple[int, ...] = ()
    nodes: tuple[str, ...] = ()
    """Names of the nodes on which the failed ranks ran."""
    code: int = EXIT_CRASH
    log: str = field(default="", repr=False)
    """Text that explains the failure: output or stacks of ranks."""
    advice: str = ""
    """Advice that follows from how the rank ended, or empty."""


def name_cause(reports: list[RankReport], names: dict[int, str]) -> Cause | None:
    """Return the cause of the failure, or None if no rank failed.

    reports: reports of all ranks on reachable nodes. names: node of each rank; empty for one machine.
    """
    failed = sorted((report.failure for report in reports if report.failure), key=lambda failure: failure.time)
    first = failed[0] if failed else None
    user = next((report for report in reports if report.said == EXIT_USER), None)
    if user is not None:
        text = user.failure.message if user.failure else f"rank {user.rank} reported:\n{_tail(user)}"
        return _cause(Kind.user, text, [user], names, EXIT_USER)
    vanished = [report for report in reports if report.bad and report.failure is None]
    late = [report for report in vanished if report.code == -signal.SIGABRT]
    if not any(NCCL_TIMEOUT in _tail(report) for report in late):  # rank 0 of a local run has no log
        late = []
    vanished = [report for report in vanished if report not in late]
    vanished = [report for report in vanished if report.certain] or vanished
    if vanished:
        lines = [f"{_who(report, names)} ended by {_how(report)}" for report in vanished]
        code = EXIT_DIVERGED if vanished[0].said == EXIT_DIVERGED else EXIT_CRASH
        kind = Kind.diverged if code == EXIT_DIVERGED else Kind.killed
        cause = _cause(kind, "; ".join(lines), vanished, names, code, _tail(vanished[0]))
        return replace(cause, advice=cure_of_end(vanished[0].code)) if kind is Kind.killed else cause
    silent = [report for report in reports if not report.ended and report.failure is None]
    if silent and (late if first is None else first.kind == "timeout"):
        ranks = ", ".join(_who(report, names) for report in silent) + (" hangs" if len(silent) == 1 else " hang")
        return _cause(Kind.hang, f"{ranks}: no answer while the others waited in a collective", silent, names)
    if first is None and late:
        ranks = ", ".join(_who(report, names) for report in late)
        text = f"{ranks} waited longer than cluster.timeout in a collective"
        return _cause(Kind.hang, text, late, names, log=_tail(late[-1]))
    if first is None:
        return None
    began = [report for report in reports if report.rank in first.ranks]
    who = ", ".join(_who(report, names) for report in began)
    if first.code == EXIT_DIVERGED:
        text = f"{who} failed: {first.message}" if began else first.message
        return _cause(Kind.diverged, text, began or failed, names, EXIT_DIVERGED)
    text = f"{who or _who(first, names)} failed: {first.headline or _headline(first.message)}"
    code = EXIT_CRASH if first.code == EXIT_STOPPED else first.code
    return _cause(Kind.crash, text, began or [first], names, code, first.message)


def _cause(
    kind: Kind,
    text: str,
    said: Sequence[RankReport | Failure],
    names: dict[int, str],
    code: int = EXIT_CRASH,
    log: str = "",
) -> Cause:
    ranks = tuple(each.rank for each in said)
    return Cause(kind, text, ranks, tuple(sorted({names[rank] for rank in ranks if rank in names})), code, log)


def _headline(message: str) -> str:
    """Return the message if it is an error screen, else its first line."""
    return message.strip() if "\n  rule: " in message else message.strip().splitlines()[0]


def _who(report: RankReport | Failure, names: dict[int, str]) -> str:
    return f"rank {report.rank}" + (f" on {names[report.rank]}" if report.rank in names else "")


def _tail(report: RankReport) -> str:
    return report.log_tail or ""


def _how(report: RankReport) -> str:
    """Describe how a rank without a failure report ended."""
    assert report.code is not None, "it has ended"
    if report.code < 0:
        memory = " (out of memory?)" if -report.code == signal.SIGKILL else ""
        return f"signal {signal_name(-report.code)}{memory}"
    if report.deserted:
        return f"exit code {report.code} before the end of its work"
    return f"exit code {report.code}" + (
        "; its output is above" if report.log_tail is None else " without an error message"
    )


def signal_name(number: int) -> str:
    """Return a signal's name, or its number if it has none."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"{number}"


def cure_of_end(code: int | None) -> str:
    """Return advice for a rank that ended with this code without a report."""
    if code is None or code >= 0:
        return CURE_OF_EXITS
    return CURES_OF_SIGNALS.get(-code, CURE_OF_OTHER_SIGNALS)


WAITS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "barrier", "recv", "send", "wait")
"""Names of functions in which a rank waits for other ranks."""
NATIVE_HEAD = "Native threads, by pystack: "
"""Heading before the stacks of native threads."""
_OF_PYTHON = re.compile(r"/lib/python3[.]\d+/(?!site-packages|dist-packages)")
"""Matches paths of the standard library's files. A `wait` in such a file does not wait for another rank."""


def name_hang(reports: list[RankReport], stacks: dict[int, str], names: dict[int, str], seconds: float) -> Cause:
    """Name the ranks that hang: the first of these groups that has some but not all ranks.

        - stopped ranks
        - ranks without a stack
        - ranks that do not wait for others

    stacks: faulthandler traceback of each rank that answered.
    """
    stopped = [report for report in reports if report.state == "T"]
    silent = [report for report in reports if report.rank not in stacks and not report.ended]
    working = [report for report in reports if report.rank in stacks and not waits_for_ranks(stacks[report.rank])]
    groups = ((stopped, "is stopped"), (silent, "does not return a stack"), (working, "is not in a collective"))
    everyone = (reports, "wait for each other")
    found, what = next((group for group in groups if 0 < len(group[0]) < len(reports)), everyone)
    ranks = ", ".join(_who(report, names) for report in found)
    steps = steps_in_words([report.step for report in reports])
    where = innermost(stacks[found[0].rank]) if found[0].rank in stacks else ""
    text = f"no step finished for {seconds:.0f} s ({steps}): {ranks} {what}{where}"
    who = {report.rank: _who(report, names) for report in reports}
    log = "\n".join(
        f"{who[rank]}:\n{stack.partition(NATIVE_HEAD)[0].strip()}" for rank, stack in sorted(stacks.items())
    )
    return _cause(Kind.hang, text, found, names, EXIT_CRASH, log)


def main_thread_frames(stack: str) -> list[str]:
    """Return the frames of the main thread, innermost first. faulthandler prints this thread last."""
    start = max(stack.rfind("\nThread "), stack.rfind("\nCurrent thread "), 0)
    return [line.strip() for line in stack[start:].splitlines() if line.lstrip().startswith("File ")]


def waits_for_ranks(stack: str) -> bool:
    """Whether the main thread's innermost frames wait for other ranks, not for local threads."""
    frames = [frame for frame in main_thread_frames(stack)[:4] if not _OF_PYTHON.search(frame)]
    return any(frame.rpartition(" in ")[2].lstrip("_").startswith(WAITS) for frame in frames)


def innermost(stack: str) -> str:
    """Return text about the line that the main thread executes. stack: stacks of all threads."""
    frames = main_thread_frames(stack)
    return f", at {frames[0]}" if frames else ""
