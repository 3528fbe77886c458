"""Where a run starts: rank 0 looks for the checkpoint, every rank reads its part of it."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.schema import Config
from parallel.exchange import from_rank_0, gather
from parallel.shard import Shard
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.load import fill
from train.checkpoint.manifest import Damaged, manifest_of, newest_intact, read_manifest
from train.checkpoint.memory import MemoryCopies
from train.data.prepare import Prepared
from train.data.tokenizer import Tokenizer
from train.hf.folder import Folder, Stored
from train.loop.changed_settings import changed
from train.loop.start import check_start, start_from
from train.loop.state import State
from train.run_folder import RunPaths, resume_point
from train.trained_with import require_tokenizer


@dataclass
class Restored:
    """Where the state of a run comes from."""

    notes: list[str] = field(default_factory=list)
    """For a person."""
    resumed: dict[str, Any] | None = None
    """`resumed` in train/metrics/names.py; None where no checkpoint was read."""


def has_start(config: Config, copies: MemoryCopies | None) -> bool:
    """Whether `restore` will fill all weights, or raise: then none need to be drawn. Collective over all ranks."""
    return from_rank_0(lambda: _has_start(config, copies))


def _has_start(config: Config, copies: MemoryCopies | None) -> bool:
    """On rank 0."""
    in_memory = copies is not None and _newest_copy(config, copies) != (None, None)
    return in_memory or config.init_from is not None or resume_point(config).path is not None


def restore(
    config: Config,
    data: Prepared,
    state: State,
    checkpointer: Checkpointer,
    copies: MemoryCopies | None = None,
    required: bool = False,
) -> Restored:
    """Load the newest copy in memory, or the checkpoint that config.resume means, if any.

    required: `has_start` said that there is one, and no weights are drawn.
    What turns out damaged on any rank is passed over under resume=auto. Raises UserError if the checkpoint belongs to
    another tokenizer or a longer run.
    """
    skip: set[Path] = set()
    notes: list[str] = []
    if copies is not None and (restored := _restore_copies(config, data, state, copies, notes)):
        return restored
    while True:
        name, warnings = from_rank_0(lambda: _resume_point(config, skip))
        notes += [f"passed over a damaged checkpoint: {warning}" for warning in warnings if not skip]
        gone = required and config.init_from is None
        if name is None and (notes or gone):  # the weights may be half loaded, and nobody asked to begin anew
            raise UserError(
                "resume",
                config.resume,
                f"there is no checkpoint on disk, and copies in memory are of no use: {'; '.join(notes) or 'they are gone'}",
                "start once with checkpoint.every_memory=0 to begin anew, or take another name=",
            )
        if name is None:
            return Restored(notes if config.init_from is None else notes + _start(config, data.tokenizer, state))
        path = Path(name)
        meta = read_manifest(path).meta
        _fits(config, data.tokenizer, path, meta)
        problem = _load(state, meta, lambda wanted, path=path: checkpointer.load(path, wanted))
        if problem is None:
            return _resumed(config, data, meta, notes, str(path))
        if config.resume != "auto":
            raise UserError("resume", config.resume, problem, "give another checkpoint, or use resume=auto")
        notes.append(f"passed over a damaged checkpoint: {problem}")
        skip.add(path)


def _resume_point(config: Config, skip: Collection[Path]) -> tuple[str | None, list[str]]:
    """On rank 0: the checkpoint to resume from, if any, and what is wrong with those passed over."""
    found = resume_point(config, skip=skip)
    return None if found.path is None else str(found.path), found.warnings


def _resumed(config: Config, data: Prepared, meta: dict[str, Any], notes: list[str], where: str) -> Restored:
    changes = changed(config, data.fingerprint, meta)
    resumed = {"step": meta["step"], "from": where} | changes.plain()
    return Restored([*notes, f"resumed from step {meta['step']}: {where}", *changes.notes()], resumed)


def _restore_copies(
    config: Config, data: Prepared, state: State, copies: MemoryCopies, notes: list[str]
) -> Restored | None:
    """Load the set in memory, if it is newer than every checkpoint on disk; None if that did not work. Adds to the notes."""
    body, warning = from_rank_0(lambda: _newest_copy(config, copies))
    if warning is not None:
        notes.append(f"passed over copies in memory: {warning}")
    if body is None:
        return None
    manifest = manifest_of(Path(body["folder"]), body)
    _fits(config, data.tokenizer, manifest.folder, manifest.meta)
    problem = _load(state, manifest.meta, lambda wanted: fill(manifest, copies.files(), wanted))
    if problem is not None:
        notes.append(f"passed over copies in memory: {problem}")
        return None
    copies.resumed()
    return _resumed(config, data, manifest.meta, notes, f"copies in memory, {manifest.folder}")


def _newest_copy(config: Config, copies: MemoryCopies) -> tuple[dict[str, Any] | None, str | None]:
    """On rank 0: the body of the manifest of the set to resume from, None if there is none or the disk has a newer state;
    and what is wrong with it.
    """
    try:
        manifest = copies.manifest()
    except Damaged as error:
        return None, error.line
    if manifest is not None and config.resume == "auto":
        disk = newest_intact(RunPaths(config).checkpoints).path
        if disk is not None and read_manifest(disk).age > manifest.age:
            return None, None
    return manifest and manifest.body(), None


def _load(state: State, meta: dict[str, Any], load: Callable[[dict[str, Shard]], Any]) -> str | None:
    """Fill the state by `load` on all ranks; returns the first problem of any of them."""
    problem = None
    try:
        load(state.wanted(meta["has_ema"]))
    except Damaged as error:
        problem = error.line
    problem = next((text for text in gather(problem) if text), None)
    if problem is None:
        state.loaded(meta, meta["has_ema"])
    return problem


def _start(config: Config, tokenizer: Tokenizer, state: State) -> list[str]:
    """Begin from the weights of init_from; rank 0 alone looks at all headers."""

    def look() -> tuple[str, dict[str, tuple], list[str]]:
        folder, notes = check_start(config, tokenizer)
        return str(folder.path), {name: (at.file, at.dtype, at.shape) for name, at in folder.stored.items()}, notes

    path, headers, notes = from_rank_0(look)
    stored = {name: Stored(file, dtype, tuple(shape)) for name, (file, dtype, shape) in headers.items()}
    folder = Folder(Path(path), stored)
    start_from(config, folder, state)
    return [*notes, f"started from the weights of {folder.path}: {len(folder.stored)} tensors"]


def _fits(config: Config, tokenizer: Tokenizer, path: Path, meta: dict[str, Any]) -> None:
    require_tokenizer(tokenizer.fingerprint, config.data.tokenizer, path, meta)
    if meta["step"] > config.steps:
        raise UserError(
            "steps",
            config.steps,
            f"must not be less than the {meta['step']} steps that {path} has behind it",
            f"set steps={meta['step']} or more, or take another name= for a new run",
        )
