"""Combines the files of all ranks into one checkpoint, without collectives, because threads must not issue any.

1. Every rank writes its data file, then its index by rename, into checkpoints/.step_N.attempt_A.save_K.tmp/.
   The index is the rank's vote: its data are on disk. Ranks other than 0 are then done.
2. Rank 0 waits for all votes, merges them into manifest.json, and renames the folder to step_N. That rename is
   the commit: before it no folder has the final name, after it everything is durable.

A rank that cannot write leaves a note, rank_R.failed, so that rank 0 gives up at once instead of at its timeout. If the
disk refuses the note too, the rank leaves it in the store of the rendezvous. When rank 0 gives up, it removes the
folder. A late rank may create it again; the next save clears it. A rank whose loop continued without a save (`abandon`)
neither votes for it nor commits it.

Fencing. Ranks on a node that lost its network keep running while a new attempt runs elsewhere. They must not rename or
prune over its checkpoints. `.fence` holds the highest attempt number. A new attempt, or the driver of a new launch,
raises it. An attempt that reads a number higher than its own stops. Raising the number, and check plus rename, happen
under one advisory lock. So no attempt can be overtaken between its check and its rename, if the file system shares
flock between hosts (NFSv4, Lustre with -o flock, one machine). Otherwise a window of a few microseconds remains between
check and rename. Then a whole, intact checkpoint of the old attempt may appear, and it sorts before all checkpoints of
the new one (`Manifest.age`).
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
    """A newer attempt of this run has started, so this one must stop writing."""


class SaveAbandoned(RuntimeError):
    """This save cannot be committed; the text names the failed rank and the reason. late: no rank failed, but some
    were late."""

    def __init__(self, text: str, ranks: Sequence[int] = (), late: bool = False):
        super().__init__(text)
        self.ranks, self.late = tuple(ranks), late


def next_attempt(root: Path) -> int:
    """The number for a new attempt of the run whose checkpoints are in `root`: higher than every earlier one."""
    return read_fence(root) + 1


@dataclass(frozen=True)
class Save:
    """Identifies one save, equally on every rank."""

    step: int
    serial: int
    """Number of the save within the attempt. It separates the files of a failed save from a later save of the same
    step."""


class Committer:
    """Changes the checkpoints/ folder of a run, as one rank of one attempt."""

    def __init__(
        self,
        root: Path,
        attempt: int,
        world_size: int,
        timeout: float,
        poll: float = 0.02,
        notes: RankNotes | None = None,
    ):
        """`timeout`: maximum wait for other ranks or for the lock, in seconds; `poll`: first pause between checks;
        `notes`: None for a single rank."""
        self._notes = notes
        self.root, self.attempt, self.world_size = root, attempt, world_size
        self.timeout, self.poll = timeout, poll
        self._abandoned: set[Save] = set()
        """Saves that this rank abandoned; the loop adds them, the save threads read them."""

    def enter(self, rank: int) -> None:
        """Start as this rank; AttemptFenced if a newer attempt has started.

        Rank 0 also fences older attempts and sweeps, and raises UserError if another process keeps the lock.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        self._check_fence()
        if rank == 0:  # only rank 0, because thousands of ranks would queue for the lock
            self.raise_fence()
            self.sweep()

    def raise_fence(self) -> None:
        """Fence all older attempts; AttemptFenced if a newer one has started."""
        with hold_lock(self.root, self.timeout):
            self._check_fence()
            if read_fence(self.root) < self.attempt:
                write_fence(self.root, self.attempt)

    def sweep(self) -> None:
        """Remove the incomplete folders of dead attempts."""
        with hold_lock(self.root, self.timeout):
            self._check_fence()
            for folder in self.root.glob(".step_*"):
                match = HIDDEN.fullmatch(folder.name)
                if match is None or int(match["attempt"]) >= self.attempt:
                    continue  # of this attempt: a rank faster than rank 0 already writes there
                if match["kind"] == "replaced" and not (self.root / match["name"]).exists():
                    folder.rename(self.root / match["name"])  # its writer died between the two renames of a commit
                else:
                    shutil.rmtree(folder, ignore_errors=True)  # a live writer of the old attempt may still write here

    def begin(self, save: Save, rank: int) -> Path:
        """Create the folder to which every rank writes this save. Raises AttemptFenced.

        Rank 0 also removes the folders of earlier, failed saves.
        """
        self._check_fence()
        folder = self._temporary(save)
        older = [
            other
            for other in (self.root.glob(f".step_*.attempt_{self.attempt}.save_*.tmp") if rank == 0 else ())
            if (match := HIDDEN.fullmatch(other.name)) and int(match["serial"]) < save.serial
        ]
        if older:
            with self._lock():  # so that no abandoned save is being renamed meanwhile
                for other in older:
                    shutil.rmtree(other, ignore_errors=True)  # a slow rank may still write there; its files are useless
        folder.mkdir(exist_ok=True)
        return folder

    def abandon(self, save: Save) -> None:
        """Continue without this save, which must no longer be committed. Returns at once."""
        self._abandoned.add(save)

    def refuse_lost(self, save: Save) -> None:
        """Check before a retry that the save is still wanted; raises AttemptFenced or SaveAbandoned if not."""
        self._check_fence()
        self._check_wanted(save)
        if not self._temporary(save).is_dir():
            raise SaveAbandoned("rank 0 gave up; see its log")

    def is_overtaken(self) -> bool:
        """Whether a newer attempt has started, which may explain a failed operation. Never raises OSError."""
        try:
            return read_fence(self.root) > self.attempt
        except OSError:
            return False  # the original failure is reported in any case

    def vote(self, save: Save, rank: int, index: dict[str, Any]) -> None:
        """Declare that this rank's data file is on disk. Raises SaveAbandoned."""
        self._check_wanted(save)
        atomic_write_json(self._temporary(save) / index_name(rank), index)

    def give_up(self, save: Save, rank: int, why: str) -> None:
        """Remove this rank's files and tell rank 0 that they will not come. Never raises OSError."""
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
        """Rank 0: the index files of all ranks, once complete; SaveAbandoned if a rank failed or the time is up."""
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
        """Rank 0, after all votes: make the temporary folder the checkpoint of its step, and return its path.

        Raises AttemptFenced, SaveAbandoned.
        """
        folder = self._temporary(save)
        atomic_write_text(folder / MANIFEST, seal(manifest))
        final = self.path(save)
        aside = self._hidden(final.name, "replaced")
        with self._lock():
            self._check_fence()
            self._check_wanted(save)
            if final.exists():  # damaged, or from training that was rolled back; a rename cannot replace a folder
                final.rename(aside)
            folder.rename(final)
            fsync_folder(self.root)
        shutil.rmtree(aside, ignore_errors=True)
        return final

    def prune(self, keep: int, keep_every: int, *protected: Path | None) -> None:
        """Rank 0: remove old checkpoints.

        It keeps the `keep` newest intact ones (0: all), multiples of `keep_every` steps, and `protected`. Damaged
        folders are neither counted nor touched.
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
                # Renamed first, so that no reader sees a partly removed folder as a damaged checkpoint.
                doomed.append(manifest.folder.rename(self._hidden(manifest.folder.name, "pruned")))
        for folder in doomed:
            shutil.rmtree(folder)

    def path(self, save: Save) -> Path:
        """Path of the committed checkpoint."""
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
        """Call `ready` at growing intervals until it is true; False if the time is up or `vain` is true."""
        deadline, pause = time.monotonic() + self.timeout, self.poll
        while not ready():
            if time.monotonic() > deadline or vain():
                return False
            time.sleep(pause)
            pause = min(pause * 1.5, 0.5)
        return True
