"""What the processes of a run leave on disk for each other: names and formats, which ranks and drivers alike take from here.

checkpoints/.fence                       highest attempt number that may write there; see train/checkpoint/commit.py
checkpoints/.lock                        held while the fence or the name of a checkpoint changes
checkpoints/step_00001234/               a committed checkpoint; see train/checkpoint/manifest.py
    manifest.json                        is there before the folder has this name, and says which attempt wrote it
    rank_00003.safetensors               a rank's part
    rank_00003.json                      its index, written last; both look the same in the memory of a node
logs/rank_3.log                          output
logs/rank_3.error.json                   cluster.cause.Failure, written before it exits
logs/rank_3.at_work                      there from the start of its work until it has said how that ended; blanks, whose room
                                         on the disk rank_3.error.json takes where there is no other
logs/rank_3.stacks                       where its threads were when SIGUSR1 last asked for that, by faulthandler
logs/rank_3.ring                         what it communicated last; see cluster/comm_ring.py
logs/incident_1.json                     who broke the run or held it up; see cluster/incident.py
logs/stop.txt                            why the ranks are asked to stop, where their agent knows
logs/rank_3.progress.json                {"step": 17, "phase": "step", "time": ..., "sequences": 64, "busy": ..., "seconds": ...,
                                         "memory": ..., "pid": ..., "host": ...}, at every step; busy, if there: seconds of the last
                                         step that were its own work, of all its seconds
ranks.json                               how all ranks are, as the driver of cluster=ray knows, see cluster/driver/rank_table.py
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
"""Pattern of the folders of checkpoints."""
FAILURES = "rank_*.error.json"
"""Pattern of `failure_path`."""
AT_WORK = "rank_*.at_work"
"""Pattern of `at_work_path`."""
PROGRESS = "rank_*.progress.json"
"""Pattern of `progress_path`."""
RINGS = "rank_*.ring"
"""Pattern of `cluster.comm_ring.ring_path`."""
COUNTS_AT = 104
COUNTS = struct.Struct("<QQ")
"""Pieces of work that the rank has done, and bytes that it has written of checkpoints (cluster/comm_ring.py); they only grow."""
RANK_FILE = re.compile(r"rank_(\d{5,18})\.(safetensors|json)")
LATEST = 1e11
"""Unix time that no file of a run has: of the year 5138."""
LOCK = ".lock"
_FENCE = ".fence"


class Age(NamedTuple):
    """Order of writing: a later attempt is newer even where it resumed from an earlier step."""

    attempt: int
    step: int


NONE = Age(0, -1)
"""Before every state of a run."""


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
    """Pieces of work that a rank has done, and bytes that it has written of checkpoints; zeros where it has no ring."""
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
    """The highest attempt number that may write there; -1 for none. Raises UserError for what is no such number."""
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
            "checkpoint", path, f"is damaged: it must hold the number of an attempt, not {text!r:.60}", cure
        )
    return int(text)


@contextmanager
def hold_lock(checkpoints: Path, timeout: float) -> Iterator[None]:
    """Hold the lock of checkpoints/ for what a start changes there. UserError where it stays locked for longer than this, in seconds."""
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(checkpoints / LOCK, timeout))
        except TimeoutError as error:
            cure = f"end the process that holds it (`fuser {checkpoints / LOCK}` names it), which may be of another host, and start again"
            raise UserError("checkpoint", checkpoints / LOCK, f"cannot be locked: {error}", cure) from error
        yield


def write_fence(checkpoints: Path, attempt: int) -> None:
    """Shut out the attempts before this one."""
    atomic_write_text(checkpoints / _FENCE, str(attempt))
