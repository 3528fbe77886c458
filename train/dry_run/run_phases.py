"""Measures one rank's memory in all phases of a run: start, step, work outside of steps, and restarts.

Each phase runs the code of a real run. A rank that runs alone saves each of its shards as a complete tensor.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from shutil import disk_usage

from torch import Tensor

from cluster.driver.copies import Shelf, Shelves
from cluster.node.copy_store import Store, folder_bytes
from conf.changed_settings import settings_of
from conf.run_paths import RunPaths
from conf.schema import Config
from parallel.shard import Shard, whole
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.manifest import checkpoints
from train.checkpoint.memory_copies import SETS, MemoryCopies
from train.data.tokenizer import Tokenizer, train_bpe
from train.loop.hooks.averaged_weights import AveragedWeights, weight_averages
from train.loop.hooks.published_weights import NEWEST, WEIGHTS_FOLDER, publish_weights
from train.loop.start import check_start, start_from
from train.loop.state import RunState
from train.metrics.quantities import gib
from train.plan.memory.ledger import PeakMeter, PhaseBytes
from train.plan.memory.rank_memory import HELD_COPIES
from train.rank_parts import ParallelModel, RankSetup

TOKEN = "of a dry run"
"""Secret that a rank sends to the stores of in-memory copies."""
NOTHING_BEFORE = PhaseBytes(0, 0)


class RunPhases(ExitStack):
    """Runs one rank through the phases of a run, and measures their memory peaks (`peaks`).

    As a context manager, it closes the stores of in-memory copies.
    """

    def __init__(
        self,
        config: Config,
        rank: RankSetup,
        folder: Path,
        build: Callable[[bool], ParallelModel],
        *,
        is_alone: bool,
    ):
        """folder: folder for the files of all ranks
        build: function that builds the model; its argument says whether weights will be loaded
        is_alone: whether other ranks, or some layers of this rank, are absent
        """
        super().__init__()
        self._config, self._rank, self._is_alone = replace(config, runs=str(folder)), rank, is_alone
        self._build = build
        self._number, self._world = (0, 1) if is_alone else (rank.mesh.rank, rank.mesh.layout.world)
        self._paths, self._folder = RunPaths(self._config), folder
        self._tokenizer = Tokenizer(train_bpe((), 0))
        self._exported = self._paths.path / WEIGHTS_FOLDER / NEWEST
        self._nodes: list[Path] = []
        self._averages: list[AveragedWeights] = []
        self._held: tuple[object, ...] = ()
        """The open checkpointer and in-memory copies, whose buffers stay allocated."""
        self.peaks: dict[str, PhaseBytes] = {}
        """Memory peak of each phase so far."""
        self.unsaved = ""
        """Why no files were saved; empty if they were saved."""

    def begin(self, phase: str, fill: Callable[[RunState], None] | None = None) -> tuple[ParallelModel, RunState]:
        """Start the rank, and measure this phase. fill: function that loads the weights; None: initialise them"""
        with self.meter() as meter:
            # DeepSpeed's caches hold tensors of an earlier engine, which a real run does not have.
            before = meter.mark_both()
            parts = self._build(fill is not None)
            self._averages = weight_averages(self._config, parts.zero)
            state = RunState(self._config, self._rank.mesh, parts, self._averages)
            if fill is not None:
                fill(state)
            self.mark(phase, meter, before)
        return parts, state

    def meter(self) -> PeakMeter:
        return PeakMeter(self._rank.device, counts_host=True)

    def mark(self, phase: str, meter: PeakMeter, before: PhaseBytes = NOTHING_BEFORE) -> None:
        """Record the peaks of the phase that ends now. before: bytes to subtract."""
        device, host = (most - there for most, there in zip(meter.mark_both(), before, strict=True))
        copied = sum(map(folder_bytes, self._nodes))  # the files of in-memory copies are in host memory
        on_cpu = self._rank.device.type == "cpu"
        self.peaks[phase] = PhaseBytes(device + copied * on_cpu, host + copied * (not on_cpu))

    def go_on(self, parts: ParallelModel, state: RunState, tokens_BS: Tensor, meter: PeakMeter) -> None:
        """Run and measure each kind of work outside of steps. Checkpoint buffers stay until `begin_again`."""
        for phase in self._do(parts, state, tokens_BS[: self._config.micro_batch_size]):
            self.mark(phase, meter)

    def begin_again(self) -> None:
        """Start again from the checkpoint and from exported weights, and measure both starts."""
        self._held = ()
        for phase, fill, source in (
            ("resume", self._resume, self._paths.checkpoints),
            ("init_from", self._start, self._exported),
        ):
            if not source.exists():
                continue
            self._averages = []  # the averages hold tensors of the previous start
            gc.collect()
            parts = self.begin(phase, fill)[0]
            parts.zero.engine.destroy()
            del parts
            self._nodes = []  # a new run (init_from) has no in-memory copies yet

    def _do(self, parts: ParallelModel, state: RunState, tokens_BS: Tensor) -> Iterator[str]:
        """Runs one phase after the other, and yields the name of each phase after it has run."""
        yield from self._save(state)
        for average in self._averages:
            average.ema.update()
            average.ema.flush()
            yield "average"
        parts.pipeline.evaluate(tokens_BS, micro_batches=1)
        yield "validation"

    def _save(self, state: RunState) -> Iterator[str]:
        config = self._config
        size = sum(shard.local.nbytes for shard in state.shards().values())
        saves = config.checkpoint
        needed = size * (1 + (saves.weights_every > 0) + HELD_COPIES * (saves.every_memory > 0))
        if (free := disk_usage(self._folder).free) < needed:
            self.unsaved = f"saves take {gib(needed)} temporarily in {self._folder.parent}, where {gib(free)} are free"
            return
        self._paths.path.mkdir(parents=True, exist_ok=True)
        if self._number == 0:
            self._tokenizer.save(self._paths.path)
        meta = state.meta() | {
            "name": config.name,
            "tokenizer": self._tokenizer.fingerprint,
            "data": "",
            "held_out": {},
        }
        meta |= {"seed": config.seed, "seq_len": config.seq_len, "config": settings_of(config)}
        checkpointer, copies = self._open_checkpoints(attempt=1), self._open_copies()
        self._held = checkpointer, copies
        if copies is not None:
            for step in range(SETS):
                copies.save_and_wait(step, self._placed(state.shards()), meta)
        checkpointer.save(state.step, self._placed(state.shards()), meta)
        checkpointer.finish(required=True)
        yield "checkpoint"
        if copies is not None:
            copies.save_and_wait(SETS, self._placed(state.shards()), meta)
            yield "copies"
        if config.checkpoint.weights_every and self._number == 0 and not (self._is_alone or config.adapter.on):
            publish_weights(config, state.step)
            yield "export"

    def _resume(self, state: RunState) -> None:
        newest, saved = checkpoints(self._paths.checkpoints)[0], state.shards().keys()
        wanted = self._placed(state.wanted(newest.meta))
        if self._is_alone:  # in the job, other ranks save the biases and loads
            wanted = {name: wanted[name] for name in saved}
        self._open_checkpoints(attempt=2).load(newest.folder, wanted)
        state.finish_load(newest.meta)

    def _start(self, state: RunState) -> None:
        config = replace(self._config, init_from=str(self._exported))
        start_from(config, check_start(config, self._tokenizer)[0], state)

    def _open_checkpoints(self, attempt: int) -> Checkpointer:
        staging = int(self._config.checkpoint.staging_bytes)
        return Checkpointer(
            self._paths.checkpoints, rank=self._number, world_size=self._world, attempt=attempt, staging=staging
        )

    def _open_copies(self) -> MemoryCopies | None:
        """Open stores of in-memory copies for two nodes, if the recipe has copies."""
        if not self._config.checkpoint.every_memory:
            return None
        self._nodes = [self._folder / f"node_{self._number}_{place}" for place in range(2)]
        shelves = []
        for place, node in enumerate(self._nodes):
            store = Store(node, TOKEN, "127.0.0.1", lambda: 1)
            self.callback(store.close, remove=True)
            shelves.append(Shelf(node.name, str(node), f"127.0.0.1:{store.port}", [self._number - place]))
        about = Shelves(shelves, None, [], True)
        return MemoryCopies(
            about, TOKEN, rank=self._number, world_size=self._world, attempt=1, timeout=self._config.cluster.timeout
        )

    def _placed(self, shards: dict[str, Shard]) -> dict[str, Shard]:
        return {name: whole(shard.local) for name, shard in shards.items()} if self._is_alone else shards
