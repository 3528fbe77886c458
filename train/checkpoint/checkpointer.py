"""Saves checkpoints while the training continues.

`save` copies the shards to CPU buffers. A thread writes the buffers to disk and takes part in the commit
(`train.checkpoint.commit`). A failed save becomes a warning in `poll`. The next save waits a limited
time for an unfinished save, and then gives it up. No rank commits a given-up save.
"""

import json
import textwrap
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.run_files import data_name, step_name
from conf.disk import explain_disk_error
from conf.errors import DiskFailed, UserError
from parallel.exchange import RankNotes
from parallel.shard import Shard
from train.checkpoint.commit import AttemptFenced, Committer, Save, SaveAbandoned
from train.checkpoint.read_shards import NotCovered, load_shards, merge_indexes
from train.checkpoint.staging import StagingBuffers

SAVE_PATIENCE = 0.8
"""Before a new save, a rank waits this fraction of the timeout for the unfinished previous save. Then the rank
abandons the previous save.

Below 1, because other ranks may already wait for this rank.
"""
GRACE = 0.1
"""Fraction of the timeout: an abandoned save counts as stuck if it still runs this long after it was abandoned."""
LEAST_GRACE = 1.0
"""Minimum number of seconds after which an abandoned save counts as stuck."""
MOST_STUCK = 2
"""Maximum number of stuck saves, which occupy buffers."""


class SaveFailed(DiskFailed):
    """The required last save of a run failed. late: whether the only reason is that ranks were too slow."""

    def __init__(self, root: Path, why: str, ranks: Sequence[int] = (), late: bool = False):
        cure = "free space on the disk, make it writable, or repair the failed disk (see `dmesg`)"
        if late:
            cure = "find out why the disk does not answer (its mount, dmesg), or raise cluster.timeout if the disk is only slow"
        super().__init__(
            "checkpoint", root, why, f"{cure}, and start the same command again: it resumes from the newest checkpoint"
        )
        self.ranks = tuple(ranks)


@dataclass(frozen=True)
class SaveResult:
    """Result of one save, as one rank knows it."""

    step: int
    path: Path | None
    """Path of the checkpoint; None if the save failed."""
    warning: str | None
    """Error of this save, or a warning; None without a problem."""
    fenced: bool
    """Whether this attempt must stop, because a newer one has started."""
    seconds: float
    """Duration of the save in seconds, without the wait for the previous save."""
    bytes: int
    """Number of bytes that this rank saved."""
    ranks: tuple[int, ...] = ()
    """The ranks that failed, as far as this rank knows."""
    late: bool = False
    """Whether the save took too long, without a disk error."""

    @property
    def ok(self) -> bool:
        return self.path is not None


@dataclass
class SaveInFlight:
    """A save in progress and the thread that writes it."""

    save: Save
    buffers: StagingBuffers
    began: float
    """Start time, from time.perf_counter."""
    writes: bool = True
    """Whether this rank is still writing its data."""
    over: bool = False
    """Whether the result of the save has been recorded."""
    thread: threading.Thread = field(init=False)


class Checkpointer:
    """Writes checkpoints for one rank. All ranks call `save` for the same steps."""

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
        staging: int = 0,
        notes: RankNotes | None = None,
    ):
        """Starts to use the checkpoint folder `root`. Raises AttemptFenced if a newer attempt of the run has started.

        - attempt: from `commit.next_attempt`, the same on every rank
        - timeout: maximum wait for other ranks, in seconds
        - retry_wait: seconds before the first retry; doubled for each further retry
        - staging: maximum bytes of the buffers; 0: the size of the state. Smaller buffers make the training wait.
        """
        self.rank, self.keep, self.keep_every = rank, keep, keep_every
        self.asynchronous, self.timeout = asynchronous, timeout
        self.retries, self.retry_wait, self.staging = retries, retry_wait, staging
        self.committer = Committer(Path(root).resolve(), attempt, world_size, timeout, notes=notes)
        self.committer.enter(rank)
        self._buffers: StagingBuffers | None = None
        """Buffers for the next save; None if they must be allocated."""
        self._flight: SaveInFlight | None = None
        self._stuck: list[SaveInFlight] = []
        """Saves that were given up, but whose threads are still running."""
        self._ending = threading.Lock()
        """A thread sets the result of a save under this lock."""
        self._serial = 0
        self._results: deque[SaveResult] = deque()  # the saving thread appends, and the training loop reads
        self._unsaved: int | None = None
        """Step of the last requested save; None after its success."""
        self._protected: Path | None = None
        self._best: list[Path] = []
        """Checkpoints that were the best so far when they were saved, oldest first."""

    def save(self, step: int, shards: dict[str, Shard], meta: dict[str, Any]) -> float:
        """Write the checkpoint of `step`, after the previous save.

        Returns the blocked time in seconds. meta: JSON values; the values of rank 0 are stored.
        """
        began = time.perf_counter()
        save, self._unsaved = Save(step, self._serial), step
        self._serial += 1  # also for a skipped save, because all ranks must use the same index
        self._settle()
        started = time.perf_counter()  # excludes the wait for the previous save
        self._stuck = [flight for flight in self._stuck if flight.thread.is_alive()]
        if len(self._stuck) >= MOST_STUCK:
            self._skip(save, began)
            return time.perf_counter() - began
        if self._buffers is None:
            self._buffers = StagingBuffers(any(shard.local.is_cuda for shard in shards.values()), self.staging)
        self._buffers.copy(shards)
        self._flight = flight = SaveInFlight(save, self._buffers, started)
        arguments = (flight, json.loads(json.dumps(meta)))
        flight.thread = threading.Thread(target=self._run, args=arguments, name=f"save-{step}", daemon=True)
        flight.thread.start()
        if not self.asynchronous or flight.buffers.in_pieces:
            self._settle()
        return time.perf_counter() - began

    def poll(self) -> list[SaveResult]:
        """Returns the results since the last call. Never waits."""
        results = [self._results.popleft() for _ in range(len(self._results))]
        if any(result.ok and result.step == self._unsaved for result in results):
            self._unsaved = None
        return results

    def finish(self, required: bool = False) -> list[SaveResult]:
        """Wait for the save in progress. required: raise SaveFailed if the last save failed."""
        if not required:
            self._settle()
        elif not self._join(self._longest()):
            why = f"the last checkpoint was not written within {self._longest():.0f} s by rank {self.rank}"
            raise SaveFailed(self.committer.root, why, [self.rank], late=True)
        results = self.poll()
        if required and self._unsaved is not None:
            last = next((result for result in reversed(results) if result.step == self._unsaved), None)
            if last is None or last.warning is None:
                raise SaveFailed(self.committer.root, f"the checkpoint of step {self._unsaved} was not written")
            raise SaveFailed(self.committer.root, last.warning, last.ranks, last.late)
        return results

    def load(self, path: Path, wanted: dict[str, Shard]) -> dict[str, Any]:
        """Fill shards like `train.checkpoint.read_shards.load_shards`, and protect the loaded checkpoint from
        pruning."""
        meta = load_shards(path, wanted)
        self._protected = Path(path).resolve()
        return meta

    def keep_best(self, step: int) -> None:
        """Protect this step's checkpoint, the best so far, from pruning."""
        self._best.append(self.committer.root / step_name(step))

    def _longest(self) -> float:
        """Returns the maximum seconds of a save: `timeout` each for the writing, the votes and the lock."""
        return 3 * self.timeout

    def _join(self, seconds: float) -> bool:
        """Wait for the save in progress. Returns False after `seconds`."""
        if self._flight is not None:
            self._flight.thread.join(max(0.0, seconds))
            if self._flight.thread.is_alive():
                return False
            self._flight = None
        return True

    def _settle(self) -> None:
        """Wait for the save in progress, and give it up after SAVE_PATIENCE."""
        flight = self._flight
        if flight is None or self._join(flight.began + SAVE_PATIENCE * self.timeout - time.perf_counter()):
            return
        self.committer.abandon(flight.save)
        if self._join(max(GRACE * self.timeout, LEAST_GRACE)):  # the save ended and reports a reason
            return
        self._flight = self._buffers = None
        self._stuck.append(flight)
        seconds = time.perf_counter() - flight.began
        who, ranks = (f"rank {self.rank} writes", (self.rank,)) if flight.writes else ("other ranks write", ())
        warning = (
            f"checkpoint of step {flight.save.step} given up: {who} for {seconds:.0f} s; a disk that does not answer?"
        )
        self._end(flight, SaveResult(flight.save.step, None, warning, False, seconds, 0, ranks, late=True))

    def _end(self, flight: SaveInFlight, result: SaveResult) -> None:
        """Record the first result of a save; ignore further results."""
        with self._ending:
            if not flight.over:
                flight.over = True
                self._results.append(result)

    def _skip(self, save: Save, began: float) -> None:
        """Skip this save, because too many saves are stuck, and inform rank 0."""
        steps = " and ".join(str(flight.save.step) for flight in self._stuck)
        why = f"rank {self.rank} is still writing those of steps {steps}; a disk that does not answer?"
        text = f"checkpoint of step {save.step} skipped: {why}"
        self._results.append(
            SaveResult(save.step, None, text, False, time.perf_counter() - began, 0, (self.rank,), True)
        )

        def tell() -> None:
            with suppress(OSError, AttemptFenced, UserError):  # without the note, rank 0 waits until its timeout
                self.committer.begin(save, self.rank)
                self.committer.give_up(save, self.rank, why)

        threading.Thread(target=tell, daemon=True).start()  # the disk may not answer this write either

    def _run(self, flight: SaveInFlight, meta: dict[str, Any]) -> None:
        """Run a save in its thread. Every failure becomes a `SaveResult`."""
        save, path, warning, failure = flight.save, None, None, None
        ranks, late = (self.rank,), False
        try:
            warning = self._write(flight)
            flight.writes = False
            path = self._commit(save, meta) if self.rank == 0 else self.committer.path(save)
        except OSError as error:
            failure = explain_disk_error(error)
        except SaveAbandoned as error:
            failure, ranks, late = str(error), error.ranks, error.late
        except (AttemptFenced, NotCovered) as error:
            failure, ranks = str(error), ()
        except Exception:  # a bug in Sluice: otherwise the thread's exception would be lost
            failure = textwrap.indent(traceback.format_exc(), " " * 8).strip()
        if failure is not None:
            self.committer.give_up(save, self.rank, failure)
            warning = f"checkpoint of step {save.step} not written: {failure}"
        elif self.rank == 0:
            warning = self._prune(warning)
        fenced, seconds = self.committer.is_overtaken(), time.perf_counter() - flight.began
        size = flight.buffers.layout.data_bytes
        self._end(
            flight, SaveResult(save.step, path, warning, fenced, seconds, size, ranks if path is None else (), late)
        )

    def _write(self, flight: SaveInFlight) -> str | None:
        """Write this rank's files. Returns a warning if only a retry succeeded."""
        save = flight.save
        folder = self.committer.begin(save, self.rank)
        warning = None
        for attempt in range(self.retries + 1):
            self.committer.refuse_lost(save)
            try:
                index = flight.buffers.write(folder, self.rank)
                identity = {"rank": self.rank, "step": save.step, "attempt": self.committer.attempt}
                self.committer.vote(save, self.rank, {**identity, **index})
                return warning
            except OSError as error:
                with suppress(OSError):  # a partial file uses disk space that other ranks may need
                    (folder / data_name(self.rank)).unlink(missing_ok=True)
                warning = (
                    f"try {attempt + 1} to write the checkpoint of step {save.step} failed: {explain_disk_error(error)}"
                )
                if attempt == self.retries:
                    raise
                time.sleep(self.retry_wait * 2**attempt)
        return warning

    def _commit(self, save: Save, meta: dict[str, Any]) -> Path:
        return self.committer.commit(save, merge_indexes(self.committer.await_votes(save), meta))

    def _prune(self, warning: str | None) -> str | None:
        """Remove old checkpoints. Returns `warning`, or a new warning if the removal fails."""
        try:
            best = next((path for path in reversed(self._best) if path.exists()), None)
            self.committer.prune(self.keep, self.keep_every, self._protected, best)
        except Exception as error:
            return f"old checkpoints not removed: {error!r}"
        return warning
