"""Manages a run's folder: its files, its lock, and the checkpoint to resume from. No torch, because the driver uses it.

runs/NAME/
    config.yaml        every setting, resolved; the ranks read it
    tokenizer.json     the run's tokenizer, with tokenizer_config.json
    metrics.jsonl      one JSON object for each step
    timeline.json      timeline of sampled pipeline steps, see train/metrics/timeline_file.py
    checkpoints/       see train/checkpoint/manifest.py
    logs/rank_N.log
    starts.json        command, code and machine of each start, see train/metrics/origin.py
    sample.json        text that the model generated at the end
    best.json          step and held-out loss of the best checkpoint (checkpoint.keep_best)
    report.html
    wandb/
    .lock              locked while the run's driver lives; contains its process and host
    .rank_0.lock       locked (shared) while a rank 0 of the run lives
"""

import fcntl
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import yaml

from cluster.run_files import STEP_FOLDERS
from cluster.spawn import lives, longest_afterlife
from conf.disk import describe_room, disk_errors, explain_disk_error, naming
from conf.errors import EXIT_USER, UserError
from conf.files import (
    atomic_write_json,
    atomic_write_text,
    open_lock,
    open_plain,
    read_plain,
    read_plain_json,
    try_lock,
)
from conf.load import write_config
from conf.run_paths import RunPaths
from conf.schema import Config
from conf.words import say
from conf.yaml_file import UNREADABLE
from train.checkpoint.manifest import FoundCheckpoint, checkpoints, newest_intact, read_manifest, verify

BEST = "best.json"
WANDB_PLACE = "place.json"
"""File in `wandb/` with project, entity and group of the W&B run."""
WANDB_NAMES = ("project", "entity", "group")


class RunFolder(RunPaths):
    """A run folder that this process has locked until `close`."""

    def __init__(self, config: Config, checkpoint_bytes: int = 0):
        """Create and lock the folder, and write config.yaml. checkpoint_bytes: estimated size of one checkpoint.

        First waits for the end of an earlier rank 0. Raises UserError, and leaves an existing folder unchanged, if:
        - that rank 0 does not end
        - a live run holds the folder, or another user owns it
        - the disk lacks space for the checkpoints
        - the run has checkpoints and resume=never
        """
        super().__init__(config)
        with disk_errors(config):
            _make(config, self.path)
            self._lock = _lock(self.path / ".lock", config.name)
            self._begin(config, checkpoint_bytes)

    def _begin(self, config: Config, checkpoint_bytes: int) -> None:
        try:
            _await_end_of_rank_0(self.rank_lock, config)
            _refuse_existing(config, self.checkpoints)
            check_space(config, checkpoint_bytes)
            self.checkpoints.mkdir(exist_ok=True)
            self.logs.mkdir(exist_ok=True)
            self._before = read_plain(self.config_path).decode(errors="replace") if self.config_path.is_file() else None
            if place := wandb_place(self.path):
                atomic_write_json(self.wandb / WANDB_PLACE, place)
            write_config(config, str(self.config_path))
        except BaseException:
            self.close()
            raise

    def take_back(self) -> None:
        """Restore the old config.yaml, because the ranks refused to start."""
        try:
            if self._before is None:
                self.config_path.unlink()
            else:
                atomic_write_text(self.config_path, self._before)
        except OSError as error:  # the caller reports in any case why the ranks refused
            say(
                f"{self.config_path} could not be restored after the refused start: {explain_disk_error(error)}",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Release the lock. If the process dies, the operating system releases the lock."""
        os.close(self._lock)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, UserError) and error.code == EXIT_USER:
            self.take_back()
        self.close()


@contextmanager
def held_by_rank_0(paths: RunPaths) -> Iterator[None]:
    """Returns a context manager in which rank 0 holds its shared lock."""
    paths.path.mkdir(parents=True, exist_ok=True)
    handle = open_lock(paths.rank_lock)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        os.ftruncate(handle, 0)
        with naming(paths.rank_lock):
            os.write(handle, _me().encode())
        yield
    finally:
        os.close(handle)


def _await_end_of_rank_0(path: Path, config: Config) -> None:
    """Wait for the end of an earlier start's rank 0. Raises UserError."""
    handle = open_lock(path)
    try:
        limit = longest_afterlife(config)
        deadline, reported = time.monotonic() + limit, False
        while not try_lock(handle):
            who = _holder(handle, path)
            if time.monotonic() > deadline:
                raise UserError(
                    "name",
                    config.name,
                    f"rank 0 of an earlier start still writes to {path.parent} after {limit:.0f} s: {who}",
                    "end that process, or use another name=",
                )
            if not reported:
                say(f"rank 0 of an earlier start is still running: {who}; waiting for its end", file=sys.stderr)
                reported = True
            time.sleep(0.02)
    finally:
        os.close(handle)


def _me() -> str:
    return f"process {os.getpid()} on host {socket.gethostname()}\n"


def _holder(handle: int, path: Path) -> str:
    """Returns a text about the process that holds the lock."""
    text = os.pread(handle, 200, 0).decode(errors="replace").strip()
    holder = re.fullmatch(r"process (\d{1,9}) on host (.+)", text)
    if holder is None or (holder[2] == socket.gethostname() and not lives(int(holder[1]))):
        return f"another process (`fuser {path}` names it)" + (
            f"; {text}, its previous holder, has ended" if holder else ""
        )
    return text


def is_held(run: Path) -> bool:
    """Whether a live driver or rank 0 holds a lock of the run folder, so that it can still write to the folder."""
    for lock in (run / ".lock", run / ".rank_0.lock"):
        try:
            handle = open_plain(lock, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
    return False


def resume_point(config: Config, skip: Collection[Path] = ()) -> FoundCheckpoint:
    """Finds the checkpoint to start from, and warnings for damaged ones. The path is None for a new start.

    Raises UserError if `resume` names a damaged checkpoint, or if all are damaged. Create rank 0's Checkpointer first:
    it repairs an interrupted commit.
    """
    own = RunPaths(config).checkpoints
    if config.resume == "never":
        return FoundCheckpoint(None, [])
    if config.resume != "auto":
        return _named(Path(config.resume))
    found = newest_intact(own, skip=skip)
    if found.path is None and (found.warnings or skip):
        raise UserError(
            "resume",
            config.resume,
            "no checkpoint of this run is intact: " + "; ".join([*found.warnings, *map(str, skip)]),
            f"repair or remove them in {own}, or start a new run with another name=",
        )
    return found


def find_checkpoint(config: Config, given: str | None, field: str) -> Path:
    """Finds the checkpoint `given`, or the run's newest one. Raises UserError."""
    try:
        found = resume_point(replace(config, resume=given or "auto")).path
    except UserError as error:
        cure = "give a checkpoint (runs/NAME/checkpoints/step_N) or a run (runs/NAME)"
        if field in ("evaluate.checkpoint", "generate.checkpoint", "init_from", "score.checkpoint"):
            cure += ", or a Hugging Face folder with its config.json"
        if given and (Path(given) / "adapter_config.json").is_file():
            cure = f"this is an adapter: set {field} to its base, and adapter.path={given}; or export its run with export.merge=true"
        raise UserError(field, error.value, error.rule, cure) from error
    if found is None:
        raise UserError(
            "name",
            config.name,
            f"must be a run with a checkpoint; there is none in {RunPaths(config).checkpoints}",
            f"give name=RUN, or {field}=FOLDER",
        )
    return found.absolute()


def _named(path: Path) -> FoundCheckpoint:
    """Finds the checkpoint `path`, or the newest of the run `path`. Raises UserError."""
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if root.name == "checkpoints":
        found = newest_intact(root)
        if found.path is None:
            why = "; ".join(found.warnings) or "it has none"
            raise UserError("resume", path, f"must hold an intact checkpoint: {why}", "give another run or checkpoint")
        return found
    if problems := verify(path):
        raise UserError(
            "resume",
            path,
            "must be intact: " + "; ".join(problems),
            "give another checkpoint, or use resume=auto, which selects the newest intact checkpoint of the run",
        )
    return FoundCheckpoint(read_manifest(path), [])


def wandb_place(run: Path) -> dict[str, str | None]:
    """Returns project, entity and group of the W&B run; may be empty."""
    with suppress(*UNREADABLE, KeyError, TypeError, AttributeError):
        if (run / "wandb" / WANDB_PLACE).is_file():
            found = read_plain_json(run / "wandb" / WANDB_PLACE)
            return {name: found[name] and str(found[name]) for name in WANDB_NAMES}
        if (run / "wandb" / "run_id").is_file():
            log = yaml.safe_load(read_plain(run / "config.yaml"))["log"]
            return {name: log[f"wandb_{name}"] and str(log[f"wandb_{name}"]) for name in WANDB_NAMES}
    return {}


def _make(config: Config, root: Path) -> None:
    """Create the run folder if it is missing. Raises UserError."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = f"the run folder {root} cannot be created: {error.strerror}; {describe_room(root)}"
        raise UserError("runs", config.runs, rule, "set runs=FOLDER") from error
    owner = root.stat().st_uid
    if owner != os.geteuid():
        raise UserError(
            "name",
            config.name,
            f"the run folder {root} belongs to user {owner}, and this is user {os.geteuid()}",
            "use another name= or runs=, or start as the owner",
        )


def _lock(path: Path, name: str) -> int:
    """Returns a handle that holds the lock. Raises a UserError that names another holder.

    The lock file is never removed. If it were removed, two processes could lock two different files.
    """
    handle = open_lock(path)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(handle, path)
        os.close(handle)
        raise UserError(
            "name",
            name,
            f"the run folder {path.parent} is in use by {holder}",
            "wait, stop that run, or use another name=",
        ) from None
    except OSError as error:
        os.close(handle)
        raise UserError(
            "runs",
            path.parent.parent,
            f"its file system must support flock: {error.strerror}",
            "mount it with flock, or set runs=",
        ) from error
    os.ftruncate(handle, 0)
    try:
        with naming(path):
            os.write(handle, _me().encode())
    except OSError:
        os.close(handle)
        raise
    return handle


def _refuse_existing(config: Config, folder: Path) -> None:
    """Raise UserError if resume=never and the run has checkpoints, even damaged ones."""
    if config.resume == "never" and (existing := sorted(folder.glob(STEP_FOLDERS))):
        raise UserError(
            "resume",
            config.resume,
            f"the run {config.name} already has checkpoints, the last one {existing[-1]}",
            "continue it with resume=auto, use another name=, or remove its folder",
        )


def write_best(folder: Path, step: int, loss: float) -> None:
    """Record the checkpoint with the lowest held-out loss."""
    atomic_write_json(folder / BEST, {"step": step, "validation_loss": loss})


def best_step(folder: Path) -> int | None:
    """Returns the step of the best checkpoint; None without a readable best.json."""
    with suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
        return int(read_plain_json(folder / BEST)["step"])
    return None


def check_space(config: Config, checkpoint_bytes: int) -> None:
    """Raise UserError if the disk lacks space for the checkpoints."""
    paths = RunPaths(config)
    there = len(checkpoints(paths.checkpoints))
    most = (
        config.checkpoint.keep + 1 if config.checkpoint.every else 1
    )  # without checkpoints during training, only one is saved
    most += config.checkpoint.keep_best
    copies = max(1, most + (there > 0) - there)
    place = next(folder for folder in (paths.path, *paths.path.parents) if folder.exists())
    needed, free = copies * checkpoint_bytes, shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            "runs",
            config.runs,
            f"no disk space: {copies} checkpoints of about {checkpoint_bytes / 1e9:.1f} GB need {needed / 1e9:.1f} GB, "
            f"and {free / 1e9:.1f} GB are free: {describe_room(place)}",
            "free space, set runs= to a folder on a larger disk, or lower checkpoint.keep",
        )
