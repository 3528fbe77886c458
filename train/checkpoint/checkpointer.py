"""Saves without stopping the training, and never kills it.

`save` copies the shards to CPU buffers and returns; a thread writes them and takes part in the commit (see
`train.checkpoint.commit`). A save that fails (disk full, I/O error, a rank that is gone) is retried, then given
up with its folder removed, and becomes a line of text that `poll` hands to the loop: the next save is a new
chance. Only the save at the end must succeed: `finish(required=True)` raises.

A save that is stuck, as in a write to a disk that does not answer, cannot be ended. When the next one is due it is given up, with
the rank named: the next takes other buffers, and no rank commits the old one, whenever its write returns.
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
"""Share of the timeout that a save has until the next one may go on without it: all other ranks may wait for this one by then."""
GRACE = 0.1
"""Share of the timeout in which a save that is given up has to say why; one that does not is stuck."""
LEAST_GRACE = 1.0
"""The least grace, in seconds."""
MOST_STUCK = 2
"""Saves that may be stuck at a time, as each keeps its buffers."""


class SaveFailed(DiskFailed):
    """The save that had to succeed did not. ranks: those that did not write; late: no disk refused it, it did not end in time."""

    def __init__(self, root: Path, why: str, ranks: Sequence[int] = (), late: bool = False):
        cure = "free space there, make it writable, or bring the disk back that has failed (see `dmesg`)"
        if late:
            cure = (
                "see why the disk does not answer there (its mount, dmesg), or raise cluster.timeout if it is that slow"
            )
        super().__init__(
            "checkpoint", root, why, f"{cure}, and start the same command again: it goes on from the newest checkpoint"
        )
        self.ranks = tuple(ranks)


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
    ranks: tuple[int, ...] = ()
    """Those that failed, as far as this rank knows."""
    late: bool = False
    """It was not refused, but did not end in time."""

    @property
    def ok(self) -> bool:
        return self.path is not None


@dataclass
class SaveInFlight:
    """A save and the thread that writes it."""

    save: Save
    buffers: StagingBuffers
    began: float
    """By time.perf_counter."""
    writes: bool = True
    """Whether it writes; then rank 0's waits for the other ranks."""
    over: bool = False
    """It has its result."""
    thread: threading.Thread = field(init=False)


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
        staging: int = 0,
        notes: RankNotes | None = None,
    ):
        """`root`: the folder checkpoints/. `attempt`: from `commit.next_attempt`, the same on every rank.

        `timeout`: longest wait for other ranks, in seconds; for an unfinished save somewhat less. `retries`: further tries of a
        rank whose writing failed, the first after `retry_wait` seconds, then twice as long each. `staging`: most bytes of the
        buffers; the training waits for the disk where that is less than it saves; 0 for all. `notes`: for a rank whose disk takes no word either. Raises AttemptFenced if a newer attempt has started.
        """
        self.rank, self.keep, self.keep_every = rank, keep, keep_every
        self.asynchronous, self.timeout = asynchronous, timeout
        self.retries, self.retry_wait, self.staging = retries, retry_wait, staging
        self.committer = Committer(Path(root).resolve(), attempt, world_size, timeout, notes=notes)
        self.committer.enter(rank)
        self._buffers: StagingBuffers | None = None
        """For the next save."""
        self._flight: SaveInFlight | None = None
        self._stuck: list[SaveInFlight] = []
        """Those that were given up and have not ended."""
        self._ending = threading.Lock()
        """Held while a save gets its result."""
        self._serial = 0
        self._results: deque[SaveResult] = deque()  # the thread appends while the loop polls
        self._unsaved: int | None = None
        """The step of the last save, until it is known to have succeeded."""
        self._protected: Path | None = None
        self._best: list[Path] = []
        """Checkpoints with the least held-out loss so far; the last one may not be there yet."""

    def save(self, step: int, shards: dict[str, Shard], meta: dict[str, Any]) -> float:
        """Write the state as the checkpoint of `step`; returns how long the caller was held up, in seconds.

        Waits for the save before, and for this one too unless asynchronous. `meta`: JSON values; rank 0's is stored.
        """
        began = time.perf_counter()
        save, self._unsaved = Save(step, self._serial), step
        self._serial += 1  # also where this save is skipped, as ranks must go on counting alike
        self._settle()
        started = time.perf_counter()  # what was waited for the save before is no time of this one
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
        """Results of the saves that ended since the last call; never waits."""
        results = [self._results.popleft() for _ in range(len(self._results))]
        if any(result.ok and result.step == self._unsaved for result in results):
            self._unsaved = None
        return results

    def finish(self, required: bool = False) -> list[SaveResult]:
        """Wait for the save in flight, then as `poll`. `required`: SaveFailed if the last one failed."""
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
        """Fill shards as `train.checkpoint.read_shards.load_shards` does; the checkpoint is never pruned as long as this object lives."""
        meta = load_shards(path, wanted)
        self._protected = Path(path).resolve()
        return meta

    def keep_best(self, step: int) -> None:
        """The checkpoint of this step is never pruned, once it is there, until another one is the best."""
        self._best.append(self.committer.root / step_name(step))

    def _longest(self) -> float:
        """How long a save may take, in seconds: `timeout` for each of writing, votes and the lock."""
        return 3 * self.timeout

    def _join(self, seconds: float) -> bool:
        """Wait for the save in flight; False if it still runs."""
        if self._flight is not None:
            self._flight.thread.join(max(0.0, seconds))
            if self._flight.thread.is_alive():
                return False
            self._flight = None
        return True

    def _settle(self) -> None:
        """Wait for the save in flight as long as no other rank takes this one for hung; then go on without it."""
        flight = self._flight
        if flight is None or self._join(flight.began + SAVE_PATIENCE * self.timeout - time.perf_counter()):
            return
        self.committer.abandon(flight.save)
        if self._join(max(GRACE * self.timeout, LEAST_GRACE)):  # it says which ranks it waited for
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
        """End a save; the first result of a save counts."""
        with self._ending:
            if not flight.over:
                flight.over = True
                self._results.append(result)

    def _skip(self, save: Save, began: float) -> None:
        """Take no part in this save, as too many are stuck, and let rank 0 know."""
        steps = " and ".join(str(flight.save.step) for flight in self._stuck)
        why = f"rank {self.rank} still writes those of steps {steps}; a disk that does not answer?"
        text = f"checkpoint of step {save.step} skipped: {why}"
        self._results.append(
            SaveResult(save.step, None, text, False, time.perf_counter() - began, 0, (self.rank,), True)
        )

        def tell() -> None:
            with suppress(OSError, AttemptFenced, UserError):  # the note only saves time, as in give_up
                self.committer.begin(save, self.rank)
                self.committer.give_up(save, self.rank, why)

        threading.Thread(target=tell, daemon=True).start()  # its disk may not answer either

    def _run(self, flight: SaveInFlight, meta: dict[str, Any]) -> None:
        """The thread: everything that can go wrong becomes a result."""
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
        except Exception:  # a bug of ours in this thread must reach the loop as text, not vanish with the thread
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
        """Write this rank's files, with retries; returns a warning if it took some."""
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
                with suppress(OSError):  # what is there of the file takes room that others may need
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
        """Remove old checkpoints; a failure of any kind is a warning, as the new one is safe."""
        try:
            best = next((path for path in reversed(self._best) if path.exists()), None)
            self.committer.prune(self.keep, self.keep_every, self._protected, best)
        except Exception as error:
            return f"old checkpoints not removed: {error!r}"
        return warning
