"""Combines the files of all ranks into one checkpoint. It uses no collectives, because threads must not call them.

1. Every rank writes its data file into a temporary folder. Then it adds its index: a vote that its data are on disk.
2. Rank 0 waits for all votes, writes manifest.json, and renames the folder to step_N. This rename is the commit.

A rank that cannot write its data leaves a note: the file rank_R.failed, or an entry in the rendezvous store. Rank 0
then removes the folder.

Fencing. A node that loses its network keeps running its ranks while a new attempt of the run starts elsewhere. The old
ranks must not replace or prune checkpoints of the new attempt:
- The file `.fence` contains the highest attempt number. A new attempt, or a new launch's driver, raises it.
- An attempt stops when it reads a higher number than its own.
- A commit holds a lock, so that the number does not change.

The lock needs flock between hosts (NFSv4, Lustre with -o flock, or one machine). Without it, an old attempt may still
commit a checkpoint. It counts as older than the new attempt's checkpoints (`Manifest.age`).
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.run_files import LOCK, MANIFEST, data_name, hold_lock, index_name, read_fence, step_name, write_fence
from conf.files import atomic_write_json, atomic_write_text, exclusive, fsync_folder, read_plain
from conf.words import some_of
from parallel.exchange import RankNotes
from train.checkpoint.manifest import checkpoints, seal

FAILED_FILE = re.compile(r"rank_(\d+)\.failed")
HIDDEN = re.compile(
    r"\.(?P<name>step_\d+)\.attempt_(?P<attempt>\d+)\.(save_(?P<serial>\d+)\.)?(?P<kind>tmp|replaced|pruned)"
)


class AttemptFenced(RuntimeError):
    """A newer attempt of this run has started: this attempt must stop writing."""


class SaveAbandoned(RuntimeError):
    """This save cannot be committed. late: whether the only reason is that ranks were too slow."""

    def __init__(self, text: str, ranks: Sequence[int] = (), late: bool = False):
        super().__init__(text)
        self.ranks, self.late = tuple(ranks), late


def next_attempt(root: Path) -> int:
    """Returns the number for a new attempt of the run: higher than the fence, and than the attempts of all checkpoints.

    A copy of the folder may lack the hidden fence.
    """
    return max([read_fence(root), *(manifest.attempt for manifest in checkpoints(root))]) + 1


@dataclass(frozen=True)
class Save:
    """Identifies one save, the same on all ranks."""

    step: int
    serial: int
    """Index of the save within the attempt."""


class Committer:
    """Writes, commits and removes a run's checkpoints, for one rank."""

    def __init__(
        self,
        root: Path,
        attempt: int,
        world_size: int,
        timeout: float,
        poll: float = 0.02,
        notes: RankNotes | None = None,
    ):
        """timeout: maximum wait for ranks or the lock, in seconds."""
        self._notes = notes
        self.root, self.attempt, self.world_size = root, attempt, world_size
        self.timeout, self.poll = timeout, poll
        self._abandoned: set[Save] = set()
        """Saves that this rank abandoned; the threads of saves read them."""

    def enter(self, rank: int) -> None:
        """Prepare the folder for the saves of this rank. Raises AttemptFenced if a newer attempt has started.

        Rank 0 also fences older attempts and removes their incomplete folders.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        self._check_fence()
        if rank == 0:  # only on rank 0: thousands of ranks would wait for the lock
            self.raise_fence()
            self.sweep()

    def raise_fence(self) -> None:
        """Raise the number in `.fence`, which stops older attempts. Raises AttemptFenced."""
        with hold_lock(self.root, self.timeout):
            self._check_fence()
            if read_fence(self.root) < self.attempt:
                write_fence(self.root, self.attempt)

    def sweep(self) -> None:
        """Remove the incomplete folders of earlier attempts."""
        with hold_lock(self.root, self.timeout):
            self._check_fence()
            for folder in self.root.glob(".step_*"):
                match = HIDDEN.fullmatch(folder.name)
                if match is None or int(match["attempt"]) >= self.attempt:
                    continue  # a folder of this attempt, perhaps already in use
                if match["kind"] == "replaced" and not (self.root / match["name"]).exists():
                    folder.rename(self.root / match["name"])  # undo the first of two renames of a process that died
                else:
                    shutil.rmtree(folder, ignore_errors=True)  # a rank of the old attempt may still write to it

    def begin(self, save: Save, rank: int) -> Path:
        """Create the folder for this save. Rank 0 also removes folders of failed saves."""
        self._check_fence()
        folder = self._temporary(save)
        older = [
            other
            for other in (self.root.glob(f".step_*.attempt_{self.attempt}.save_*.tmp") if rank == 0 else ())
            if (match := HIDDEN.fullmatch(other.name)) and int(match["serial"]) < save.serial
        ]
        if older:
            with self._lock():  # so that no abandoned save is renamed during the removal
                for other in older:
                    shutil.rmtree(other, ignore_errors=True)  # errors are ignored: a slow rank may still write there
        folder.mkdir(exist_ok=True)
        return folder

    def abandon(self, save: Save) -> None:
        """Forbid the commit of this save. Returns at once."""
        self._abandoned.add(save)

    def refuse_lost(self, save: Save) -> None:
        """Raise AttemptFenced or SaveAbandoned if the save can no longer be committed."""
        self._check_fence()
        self._check_wanted(save)
        if not self._temporary(save).is_dir():
            raise SaveAbandoned("rank 0 gave up; see its log")

    def is_overtaken(self) -> bool:
        """Whether a newer attempt has started. Never raises OSError."""
        try:
            return read_fence(self.root) > self.attempt
        except OSError:
            return False  # the caller reports its original error in any case

    def vote(self, save: Save, rank: int, index: dict[str, Any]) -> None:
        """Write this rank's index after its data are on disk. Raises SaveAbandoned."""
        self._check_wanted(save)
        atomic_write_json(self._temporary(save) / index_name(rank), index)

    def give_up(self, save: Save, rank: int, why: str) -> None:
        """Remove this rank's files, and tell rank 0 the reason. Never raises OSError."""
        folder = self._temporary(save)
        try:
            if rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
                return
            for name in (data_name(rank), index_name(rank)):
                (folder / name).unlink(missing_ok=True)
            atomic_write_text(folder / f"rank_{rank:05d}.failed", why, durable=False)
        except OSError:
            if self._notes is not None:
                self._notes.leave(self._note_name(save), f"{rank} {why}")

    def _note_name(self, save: Save) -> str:
        return f"attempt {self.attempt}, save {save.serial} failed"

    def await_votes(self, save: Save) -> list[bytes]:
        """Wait on rank 0 for the index files of all ranks. Raises SaveAbandoned."""
        folder, began = self._temporary(save), time.monotonic()
        missing = {index_name(rank): rank for rank in range(self.world_size)}

        def complete() -> bool:
            for name in os.listdir(folder):
                missing.pop(name, None)
                if failed := FAILED_FILE.fullmatch(name):
                    text = f"{name.removesuffix('.failed')}: {read_plain(folder / name).decode()}"
                    raise SaveAbandoned(text, [int(failed[1])])
            if missing and self._notes is not None and (note := self._notes.read(self._note_name(save))):
                rank, _, why = note.partition(" ")
                raise SaveAbandoned(f"rank_{int(rank):05d}: {why}", [int(rank)])
            return not missing

        if not self._wait(complete, lambda: save in self._abandoned):
            ranks = sorted(missing.values())
            text = f"no files from ranks {some_of(ranks, 8)} within {time.monotonic() - began:.0f} s; a disk that does not answer?"
            raise SaveAbandoned(text, ranks, late=True)
        return [(folder / index_name(rank)).read_bytes() for rank in range(self.world_size)]

    def commit(self, save: Save, manifest: dict[str, Any]) -> Path:
        """Commit on rank 0, after all votes. Returns the checkpoint's path."""
        folder = self._temporary(save)
        atomic_write_text(folder / MANIFEST, seal(manifest))
        final = self.path(save)
        aside = self._hidden(final.name, "replaced")
        with self._lock():
            self._check_fence()
            self._check_wanted(save)
            if final.exists():  # move the older checkpoint away: a rename cannot replace a folder
                final.rename(aside)
            folder.rename(final)
            fsync_folder(self.root)
        shutil.rmtree(aside, ignore_errors=True)
        return final

    def prune(self, keep: int, keep_every: int, *protected: Path | None) -> None:
        """Remove old checkpoints on rank 0, except damaged ones and the following:

        - the `keep` newest intact ones (0: all)
        - those at multiples of `keep_every` steps
        - the `protected` ones
        """
        if keep == 0:
            return
        doomed = []
        with self._lock():
            self._check_fence()
            for manifest in checkpoints(self.root)[keep:]:
                held = keep_every > 0 and manifest.step % keep_every == 0
                if held or manifest.folder in protected:
                    continue
                # Rename first: readers would report a partly removed folder as damaged.
                doomed.append(manifest.folder.rename(self._hidden(manifest.folder.name, "pruned")))
        for folder in doomed:
            shutil.rmtree(folder)

    def path(self, save: Save) -> Path:
        """Returns the path that the checkpoint has after the commit."""
        return self.root / step_name(save.step)

    def _temporary(self, save: Save) -> Path:
        return self._hidden(step_name(save.step), f"save_{save.serial}.tmp")

    def _hidden(self, name: str, kind: str) -> Path:
        return self.root / f".{name}.attempt_{self.attempt}.{kind}"

    def _lock(self) -> AbstractContextManager[None]:
        return exclusive(self.root / LOCK, self.timeout)

    def _check_fence(self) -> None:
        if (newest := read_fence(self.root)) > self.attempt:
            raise AttemptFenced(f"attempt {newest} of this run has started, this is attempt {self.attempt}")

    def _check_wanted(self, save: Save) -> None:
        if save in self._abandoned:
            raise SaveAbandoned("this rank continued without the checkpoint, because it took too long", late=True)

    def _wait(self, ready: Callable[[], bool], vain: Callable[[], bool]) -> bool:
        """Call `ready` until it returns True. Returns False after the timeout, or as soon as `vain` returns True."""
        deadline, pause = time.monotonic() + self.timeout, self.poll
        while not ready():
            if time.monotonic() > deadline or vain():
                return False
            time.sleep(pause)
            pause = min(pause * 1.5, 0.5)
        return True
