"""Where a run starts: rank 0 looks for the checkpoint, every rank reads its part of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from conf.errors import UserError
from conf.schema import Config
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.manifest import Damaged, read_manifest
from train.data.tokenizer import Tokenizer
from train.run_folder import resume_point
from train.state import State

T = TypeVar("T")


def from_rank_0(rank: int, make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, on every rank."""
    box: list[Any] = [make() if rank == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def restore(config: Config, tokenizer: Tokenizer, state: State, checkpointer: Checkpointer) -> list[str]:
    """Load the checkpoint that config.resume means, if any; returns notes for the user.

    A checkpoint that turns out damaged on any rank is passed over under resume=auto. Raises UserError if the checkpoint
    belongs to another tokenizer or a longer run.
    """
    skip: set[Path] = set()
    notes: list[str] = []
    while True:
        found = from_rank_0(state.mesh.rank, lambda: resume_point(config, skip=skip))
        notes += [f"passed over a damaged checkpoint: {warning}" for warning in found.warnings if not skip]
        if found.path is None:
            return notes
        meta = read_manifest(found.path).meta
        _fits(config, tokenizer, found.path, meta)
        problem = None
        try:
            checkpointer.load(found.path, state.wanted(meta["has_ema"]))
        except Damaged as error:
            problem = str(error)
        problems: list[Any] = [None] * state.mesh.layout.world
        dist.all_gather_object(problems, problem)
        problem = next((text for text in problems if text), None)
        if problem is None:
            state.loaded(meta, meta["has_ema"])
            return [*notes, f"resumed from step {state.step}: {found.path}"]
        if config.resume != "auto":
            raise UserError("resume", config.resume, problem, "give another checkpoint, or use resume=auto")
        notes.append(f"passed over a damaged checkpoint: {problem}")
        skip.add(found.path)


def _fits(config: Config, tokenizer: Tokenizer, path: Path, meta: dict[str, Any]) -> None:
    if meta["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            "data.tokenizer",
            config.data.tokenizer or "trained on data.path",
            f"must be the tokenizer that {path} was trained with; its fingerprint differs",
            "set data.tokenizer to that tokenizer.json, or take another name= for a new run",
        )
    if meta["step"] > config.steps:
        raise UserError(
            "steps",
            config.steps,
            f"must not be less than the {meta['step']} steps that {path} has behind it",
            f"set steps={meta['step']} or more, or take another name= for a new run",
        )
