"""Finds and restores the state that a run starts from."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from conf.changed_settings import changed
from conf.errors import UserError
from conf.optimizers import written_by
from conf.run_paths import RunPaths
from conf.schema import Config, ModelFamily
from parallel.exchange import from_rank_0, gather
from parallel.shard import Shard
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.manifest import CheckpointDamaged, manifest_of, newest_intact, read_manifest
from train.checkpoint.memory_copies import MemoryCopies
from train.checkpoint.read_shards import fill_shards
from train.checkpoint.run_folder import resume_point
from train.checkpoint.trained_with import refuse_mean, require_adapter, require_base, require_model, require_tokenizer
from train.data.prepare import PreparedData
from train.data.streamed import StreamedData
from train.data.tokenizer import Tokenizer
from train.hf.folder import Folder, StoredTensor
from train.loop.start import check_start, own_start, start_from
from train.loop.state import RunState


@dataclass
class RestoredState:
    """Describes the source of a run's restored state."""

    notes: list[str] = field(default_factory=list)
    """Notes for the user."""
    resumed: dict[str, Any] | None = None
    """Value of the metric `resumed`; None if no checkpoint was read."""


class StartingPoint(NamedTuple):
    """The state that a run starts from."""

    copy: dict[str, Any] | None = None
    """Manifest of the copies in memory to start from, or None."""
    checkpoint: str | None = None
    """Path of the checkpoint that config.resume selects, or None."""
    notes: Sequence[str] = ()
    """Texts that name the skipped copies and checkpoints, with the reasons."""

    @property
    def has_weights(self) -> bool:
        """Whether `restore` fills all weights, unless it raises an error."""
        return bool(self.copy or self.checkpoint or self.notes)

    def compiled_matmuls(self) -> bool | None:
        """Whether the resumed run uses compiled matmuls; None if unknown."""
        if self.copy is not None:
            return self.copy["meta"].get("compiled_products")
        return None if self.checkpoint is None else read_manifest(Path(self.checkpoint)).meta.get("compiled_products")


def find_start(config: Config, copies: MemoryCopies | None) -> StartingPoint:
    """Search for the starting point. Collective. Raises UserError."""
    return StartingPoint(*from_rank_0(lambda: _find_start(config, copies)))


def _find_start(config: Config, copies: MemoryCopies | None) -> StartingPoint:
    """Search for the starting point on rank 0."""
    body, notes = (None, []) if copies is None else _newest_copy(config, copies)
    return StartingPoint(body, notes=notes) if body is not None else _search_disk(config, (), notes)


def _search_disk(config: Config, skip: Collection[Path], notes: Sequence[str] = ()) -> StartingPoint:
    """Search the disk on rank 0. skip: damaged checkpoints, which are not considered."""
    found = resume_point(config, skip=skip)
    passed = [] if skip else [f"skipped a damaged checkpoint: {warning}" for warning in found.warnings]
    return StartingPoint(None, None if found.path is None else str(found.path), [*notes, *passed])


def restore(
    config: Config,
    data: PreparedData,
    state: RunState,
    checkpointer: Checkpointer,
    copies: MemoryCopies | None,
    start: StartingPoint,
) -> RestoredState:
    """Load the first available source: the newest copy in memory, the checkpoint of config.resume, or init_from.

    With resume=auto, skips damaged sources. Raises UserError for another model or tokenizer, or a longer run.
    """
    skip: set[Path] = set()
    begun = (
        _start(config, data.tokenizer, state) if config.adapter.on and config.init_from else []
    )  # checkpoints do not contain the base weights
    notes, optimizer = list(start.notes), config.optim.facts.name
    if start.copy is not None and copies is not None:
        manifest = manifest_of(Path(start.copy["folder"]), start.copy)
        _fits(config, data.tokenizer, manifest.folder, manifest.meta, state.base)
        problem = load_state(
            state, manifest.meta, optimizer, lambda wanted: fill_shards(manifest, copies.files(), wanted)
        )
        if problem is None:
            copies.mark_resumed()
            return _resumed(config, data, manifest.meta, notes, f"copies in memory, {manifest.folder}")
        notes.append(f"skipped copies in memory: {problem}")
        start = StartingPoint(*from_rank_0(lambda: _search_disk(config, skip)))
        notes += start.notes
    while start.checkpoint is not None:
        path = Path(start.checkpoint)
        meta = read_manifest(path).meta
        _fits(config, data.tokenizer, path, meta, state.base)
        problem = load_state(state, meta, optimizer, lambda wanted, path=path: checkpointer.load(path, wanted))
        if problem is None:
            return _resumed(config, data, meta, notes, str(path))
        if config.resume != "auto":
            raise UserError("resume", config.resume, problem, "give another checkpoint, or use resume=auto")
        notes.append(f"skipped a damaged checkpoint: {problem}")
        skip.add(path)
        start = StartingPoint(*from_rank_0(lambda: _search_disk(config, skip)))
    if notes:  # do not start fresh: the user did not ask for it
        raise UserError(
            "resume",
            config.resume,
            f"there is no checkpoint on disk, and the copies in memory cannot be used: {'; '.join(notes)}",
            "start once with checkpoint.every_memory=0 to begin at step 0, or use another name=",
        )
    if config.init_from is not None and not config.adapter.on:
        begun = _start(config, data.tokenizer, state)
    return RestoredState(begun)


def _resumed(config: Config, data: PreparedData, meta: dict[str, Any], notes: list[str], where: str) -> RestoredState:
    if isinstance(data.train, StreamedData) and meta["data"] == data.fingerprint:
        data.train.go_on(meta.get("stream"))
    changes = changed(config, data.fingerprint, meta)
    resumed = {"step": meta["step"], "from": where} | changes.plain()
    if config.adapter.on and "weights" not in meta["base"]:
        notes.append(
            "the checkpoint of an earlier version identifies the base of its adapter by some of its bytes; later checkpoints use all bytes"
        )
    return RestoredState([*notes, f"resumed from step {meta['step']}: {where}", *changes.notes()], resumed)


def _newest_copy(config: Config, copies: MemoryCopies) -> tuple[dict[str, Any] | None, list[str]]:
    """Returns, on rank 0, the manifest body of the newest copies in memory, and notes about damaged copies.

    The body is None if a checkpoint on disk is newer.
    """
    try:
        manifest = copies.manifest()
    except CheckpointDamaged as error:
        return None, [f"skipped copies in memory: {error.line}"]
    if manifest is not None and config.resume == "auto":
        disk = newest_intact(RunPaths(config).checkpoints).manifest
        if disk is not None and disk.age > manifest.age:
            return None, []
    return None if manifest is None else manifest.body(), []


def load_state(
    state: RunState, meta: dict[str, Any], optimizer: str, load: Callable[[dict[str, Shard]], Any]
) -> str | None:
    """Fill the state by calling `load` on all ranks. Returns the first problem of any rank, or None.

    optimizer: this run's optimizer. If another optimizer wrote the state, the optimizer's state starts from zero.
    """
    problem = None
    own = written_by(meta) == optimizer
    try:
        load(state.wanted(meta, own_optimizer=own))
    except CheckpointDamaged as error:
        problem = error.line
    problem = next((text for text in gather(problem) if text), None)
    if problem is None:
        state.finish_load(meta if own else meta | {"updates": 0})
    return problem


def _start(config: Config, tokenizer: Tokenizer, state: RunState) -> list[str]:
    """Start from the weights of init_from. Returns notes."""
    own = from_rank_0(lambda: None if (found := own_start(config, tokenizer)) is None else str(found))
    if own is not None:
        start_from(config, Path(own), state)
        return [f"started from the weights of {own}"]

    def look() -> tuple[str, str, dict[str, tuple], list[str]]:
        folder, notes = check_start(config, tokenizer)
        return (
            str(folder.path),
            str(folder.family),
            {name: (at.file, at.dtype, at.shape) for name, at in folder.stored.items()},
            notes,
        )

    path, family, headers, notes = from_rank_0(look)
    stored = {name: StoredTensor(file, dtype, tuple(shape)) for name, (file, dtype, shape) in headers.items()}
    folder = Folder(Path(path), stored, family=ModelFamily(family))
    start_from(config, folder, state)
    return [*notes, f"started from the weights of {folder.path}: {len(folder.stored)} tensors"]


def _fits(config: Config, tokenizer: Tokenizer, path: Path, meta: dict[str, Any], base: dict[str, str] | None) -> None:
    """Raise UserError if the run cannot resume from this checkpoint."""
    require_model(config, path, meta)
    require_adapter(config, path, meta)
    if base is not None:
        require_base(config, path, meta, base)
    refuse_mean(config, path, meta)
    require_tokenizer(tokenizer.fingerprint, config.data.tokenizer, path, meta)
    if meta["step"] > config.steps:
        raise UserError(
            "steps",
            config.steps,
            f"must not be less than the {meta['step']} completed steps of {path}",
            f"set steps={meta['step']} or more, or use another name= for a new run",
        )
