"""Saves without stopping the training, and never kills it.

`save` copies the shards to CPU buffers and returns; a thread writes them and takes part in the commit (see
`train.checkpoint.commit`). A save that fails (disk full, I/O error, a rank that is gone) is retried, then given
up with its folder removed, and becomes a line of text that `poll` hands to the loop: the next save is a new
chance. Only the save at the end must succeed: `finish(required=True)` raises.
"""

import json
import threading
import time
import traceback
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.run_files import data_name
from conf.disk import explain
from conf.errors import DiskFailed
from parallel.shard import Shard
from train.checkpoint.commit import Committer, Fenced, Save, SaveAbandoned
from train.checkpoint.intervals import NotCovered, merge
from train.checkpoint.load import load
from train.checkpoint.stage import StagingBuffers


class SaveFailed(DiskFailed):
    """The save that had to succeed did not."""

    def __init__(self, root: Path, why: str):
        cure = "free space there or make it writable, and start the same command again: it goes on from the newest checkpoint"
        super().__init__("checkpoint", root, why, cure)


@dataclass(frozen=True)
class SaveResult:
    """How one save ended, as this rank knows it."""

    step: int
    path: Path | None
    """The checkpoint; None if the save failed. Only rank 0 knows of the commit: on others, where it will be."""
    warning: str | None
    """What went wrong, also if the checkpoint was written (retries, old ones not removed)."""
    fenced: bool
    """A newer attempt of the run has started: stop this one."""
    seconds: float
    """From the call of save to its end."""
    bytes: int
    """Size of this rank's data."""

    @property
    def ok(self) -> bool:
        return self.path is not None


class Checkpointer:
    """The checkpoints of a run, as one rank of one attempt writes them. Every rank calls save for the same steps."""

    def __init__(
        self,
        root: Path,
        *,
        rank: int,
        world_size: int,
        attempt: int = 0,
        keep: int = 3,
        keep_every: int = 0,
        asynchronous: bool = True,
        timeout: float = 600.0,
        retries: int = 2,
        retry_wait: float = 1.0,
    ):
        """`root`: the folder checkpoints/. `attempt`: from `commit.next_attempt`, the same on every rank.

        `timeout`: longest wait for other ranks and for an unfinished save, in seconds. `retries`: further tries of a
        rank whose writing failed, the first after `retry_wait` seconds, then twice as long each. Raises Fenced if a
        newer attempt has started.
        """
        self.rank, self.keep, self.keep_every = rank, keep, keep_every
        self.asynchronous, self.timeout = asynchronous, timeout
        self.retries, self.retry_wait = retries, retry_wait
        self.committer = Committer(Path(root).resolve(), attempt, world_size, timeout)
        self.committer.enter(rank)
        self._stage: StagingBuffers | None = None
        self._thread: threading.Thread | None = None
        self._serial = 0
        self._results: deque[SaveResult] = deque()  # the thread appends while the loop polls
        self._unsaved: int | None = None
        """The step of the last save, until it is known to have succeeded."""
        self._protected: Path | None = None

    def save(self, step: int, shards: dict[str, Shard], meta: dict[str, Any]) -> float:
        """Write the state as the checkpoint of `step`; returns how long the caller was held up, in seconds.

        Waits for the save before, and for this one too unless asynchronous. `meta`: JSON values; rank 0's is stored.
        """
        began = time.perf_counter()
        save, self._unsaved = Save(step, self._serial), step
        self._serial += 1  # also where this save is skipped, as ranks must go on counting alike
        if not self._join(self.timeout):
            warning = f"checkpoint of step {step} skipped: the one before is still being written"
            self._results.append(SaveResult(step, None, warning, False, time.perf_counter() - began, 0))
            return time.perf_counter() - began
        if self._stage is None:
            self._stage = StagingBuffers(pinned=any(shard.local.is_cuda for shard in shards.values()))
        self._stage.copy(shards)
        arguments = (save, json.loads(json.dumps(meta)), began)
        self._thread = threading.Thread(target=self._run, args=arguments, name=f"save-{step}", daemon=True)
        self._thread.start()
        if not self.asynchronous:
            self._join(self._longest())
        return time.perf_counter() - began

    def poll(self) -> list[SaveResult]:
        """Results of the saves that ended since the last call; never waits."""
        results = [self._results.popleft() for _ in range(len(self._results))]
        if any(result.ok and result.step == self._unsaved for result in results):
            self._unsaved = None
        return results

    def finish(self, required: bool = False) -> list[SaveResult]:
        """Wait for the save in flight, then as `poll`. `required`: SaveFailed if the last one failed."""
        done = self._join(self._longest())
        results = self.poll()
        if required and not done:
            why = f"the last checkpoint was not written within {self._longest():.0f} s"
            raise SaveFailed(self.committer.root, why)
        if required and self._unsaved is not None:
            why = [result.warning for result in results if result.step == self._unsaved]
            lost = f"the checkpoint of step {self._unsaved} was not written"
            raise SaveFailed(self.committer.root, why[-1] if why else lost)
        return results

    def load(self, path: Path, wanted: dict[str, Shard]) -> dict[str, Any]:
        """As `train.checkpoint.load.load`; the checkpoint is never pruned as long as this object lives."""
        meta = load(path, wanted)
        self._protected = Path(path).resolve()
        return meta

    def _longest(self) -> float:
        """How long a save may take, in seconds: `timeout` for each of writing, votes and the lock."""
        return 3 * self.timeout

    def _join(self, seconds: float) -> bool:
        """Wait for the thread; False if it still runs."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    def _run(self, save: Save, meta: dict[str, Any], began: float) -> None:
        """The thread: everything that can go wrong becomes a result."""
        path, warning = None, None
        try:
            warning = self._write(save)
            path = self._commit(save, meta) if self.rank == 0 else self.committer.path(save)
        except OSError as error:
            warning = explain(error)
        except (Fenced, SaveAbandoned, NotCovered) as error:
            warning = str(error)
        except Exception:  # a bug of ours in this thread must reach the loop as text, not vanish with the thread
            warning = traceback.format_exc()
        if path is None:
            self.committer.give_up(save, self.rank, warning)
            warning = f"checkpoint of step {save.step} not written: {warning}"
        elif self.rank == 0:
            warning = self._prune(warning)
        fenced, seconds = self.committer.is_overtaken(), time.perf_counter() - began
        self._results.append(SaveResult(save.step, path, warning, fenced, seconds, self._stage.layout.data_bytes))

    def _write(self, save: Save) -> str | None:
        """Write this rank's files, with retries; returns a warning if it took some."""
        folder = self.committer.begin(save, self.rank)
        warning = None
        for attempt in range(self.retries + 1):
            self.committer.refuse_lost(save)
            try:
                index = self._stage.write(folder, self.rank)
                identity = {"rank": self.rank, "step": save.step, "attempt": self.committer.attempt}
                self.committer.vote(save, self.rank, {**identity, **index})
                return warning
            except OSError as error:
                with suppress(OSError):  # what is there of the file takes room that others may need
                    (folder / data_name(self.rank)).unlink(missing_ok=True)
                warning = f"try {attempt + 1} to write the checkpoint of step {save.step} failed: {explain(error)}"
                if attempt == self.retries:
                    raise
                time.sleep(self.retry_wait * 2**attempt)
        return warning

    def _commit(self, save: Save, meta: dict[str, Any]) -> Path:
        return self.committer.commit(save, merge(self.committer.await_votes(save), meta))

    def _prune(self, warning: str | None) -> str | None:
        """Remove old checkpoints; a failure of any kind is a warning, as the new one is safe."""
        try:
            self.committer.prune(self.keep, self.keep_every, self._protected)
        except Exception as error:
            return f"old checkpoints not removed: {error!r}"
        return warning
