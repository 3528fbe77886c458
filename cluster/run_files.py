"""Names and formats of the files by which the processes of a run exchange data on disk.

checkpoints/.fence                       lowest attempt number that may write there; see train/checkpoint/commit.py
checkpoints/.lock                        locked by a process while it changes the fence or a checkpoint's name
checkpoints/step_00001234/               a committed checkpoint; see train/checkpoint/manifest.py
    manifest.json                        attempt that wrote the checkpoint, and more. The file is complete before the
                                         folder gets its name
    rank_00003.safetensors               part of the checkpoint that rank 3 wrote
    rank_00003.json                      index of this part, written last. In-memory copies have both files, too
logs/rank_3.log                          output of rank 3
logs/rank_3.error.json                   cluster.cause.Failure, written before the rank exits
logs/rank_3.at_work                      exists until the rank has reported how its work ended. The file is filled with
                                         blanks: on a full disk, rank_3.error.json uses their disk space
logs/rank_3.stacks                       stacks of the rank's threads at the last SIGUSR1, by faulthandler
logs/rank_3.ring                         the rank's recent communication; see cluster/comm_ring.py
logs/incident_1.json                     the rank that broke the run or held it up; see cluster/incident.py
logs/stop.txt                            why the ranks are asked to stop, if their agent knows
logs/rank_3.progress.json                {"step": 17, "phase": "step", "time": ..., "sequences": 64, "busy": ...,
                                         "seconds": ..., "memory": ..., "pid": ..., "host": ...}, written at every step.
                                         seconds: duration of the last step. busy, if present: seconds of the rank's own
                                         work in the last step
ranks.json                               state of all ranks, from the driver of cluster=ray (cluster/driver/journal.py)
"""

import errno
import os
import re
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from conf.errors import UserError
from conf.files import atomic_write_text, exclusive, open_plain

MANIFEST = "manifest.json"
STEP_FOLDERS = "step_*"
"""Glob pattern of the folders of checkpoints."""
FAILURES = "rank_*.error.json"
"""Glob pattern of the files that `failure_path` names."""
AT_WORK = "rank_*.at_work"
"""Glob pattern of the files that `at_work_path` names."""
PROGRESS = "rank_*.progress.json"
"""Glob pattern of the files that `progress_path` names."""
RINGS = "rank_*.ring"
"""Glob pattern of the files that `ring_path` names."""
COUNTS_AT = 104
COUNTS = struct.Struct("<QQ")
"""Format of a rank's two counters: completed work units and written checkpoint bytes."""
RANK_FILE = re.compile(r"rank_(\d{5,18})\.(safetensors|json)")
LATEST = 1e11
"""Upper bound of Unix times in a run's files (year 5138)."""
LOCK = ".lock"
_FENCE = ".fence"


class Age(NamedTuple):
    """Age of a checkpoint. A checkpoint of a later attempt is newer, whatever its step is."""

    attempt: int
    step: int


NONE = Age(0, -1)
"""Age without a checkpoint, lower than every checkpoint's age."""


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def data_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def index_name(rank: int) -> str:
    return f"rank_{rank:05d}.json"


def log_path(logs: Path, rank: int) -> Path:
    return logs / f"rank_{rank}.log"


def failure_path(logs: Path, rank: int) -> Path:
    return logs / f"rank_{rank}.error.json"


def at_work_path(logs: Path, rank: int) -> Path:
    return logs / f"rank_{rank}.at_work"


def progress_path(logs: Path, rank: int) -> Path:
    return logs / f"rank_{rank}.progress.json"


def ring_path(logs: Path, rank: int) -> Path:
    return logs / f"rank_{rank}.ring"


def read_counts(logs: Path, rank: int) -> tuple[int, int]:
    """Return a rank's counts of work units and written bytes, or zeros."""
    with suppress(OSError, struct.error):
        handle = open_plain(ring_path(logs, rank), os.O_RDONLY)
        try:
            done, written = COUNTS.unpack(os.pread(handle, COUNTS.size, COUNTS_AT))
            return done, written
        finally:
            os.close(handle)
    return 0, 0


def stacks_path(logs: Path, rank: int) -> Path:
    return logs / f"rank_{rank}.stacks"


def stop_path(logs: Path) -> Path:
    return logs / "stop.txt"


def read_fence(checkpoints: Path) -> int:
    """Return the lowest attempt number that may write checkpoints; -1 without a fence. Raises UserError for a damaged
    fence.
    """
    path = checkpoints / _FENCE
    try:
        with open(path, "rb", opener=open_plain) as file:
            text = file.read(100)
    except FileNotFoundError:
        return -1
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.ELOOP):
            raise
        text = b"no plain file"
    if re.fullmatch(rb"\s*\d{1,15}\s*", text) is None:
        cure = "write the highest number of the files in attempts/ into it, or remove it if no attempt of this run is alive"
        raise UserError(
            "checkpoint", path, f"is damaged: it must contain the number of an attempt, not {text!r:.60}", cure
        )
    return int(text)


@contextmanager
def hold_lock(checkpoints: Path, timeout: float) -> Iterator[None]:
    """Hold the lock of checkpoints/ in the `with` block. Raises UserError if it stays locked for `timeout` seconds."""
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(checkpoints / LOCK, timeout))
        except TimeoutError as error:
            cure = f"end the process that holds it (`fuser {checkpoints / LOCK}` names the process; it may be on another host), and start again"
            raise UserError("checkpoint", checkpoints / LOCK, f"cannot be locked: {error}", cure) from error
        yield


def write_fence(checkpoints: Path, attempt: int) -> None:
    """Raise the fence: attempts below `attempt` can no longer write checkpoints."""
    atomic_write_text(checkpoints / _FENCE, str(attempt))
