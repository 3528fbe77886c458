"""Finds the configured checkpoint and adapts the configuration. Imports no torch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.schema import Config
from train.checkpoint.manifest import read_manifest
from train.checkpoint.run_folder import find_checkpoint
from train.data.tokenizer import refuse_tiktoken
from train.hf.folder import is_hf_folder, open_model


@dataclass(frozen=True)
class Target:
    """Weights to evaluate."""

    config: Config
    """The configuration with the weights' model shape and tokenizer."""
    checkpoint: Path
    meta: dict[str, Any] | None
    """Metadata of a Sluice checkpoint; None for a Hugging Face folder."""
    step: int | None
    notes: tuple[str, ...] = ()
    """Notes for the user about the weights."""


def find_target(config: Config) -> Target:
    """Finds the weights to evaluate. Raises UserError if they are missing."""
    given = config.evaluate.checkpoint
    if given is not None and is_hf_folder(Path(given).expanduser()):
        return _of_hf_folder(config, Path(given).expanduser().absolute())
    checkpoint = find_checkpoint(config, given, "evaluate.checkpoint")
    manifest = read_manifest(checkpoint)
    if config.evaluate.ema and not manifest.meta["has_ema"]:
        raise UserError(
            "evaluate.ema", True, f"{checkpoint} has no average of the weights", "train with optim.ema_decay=0.999"
        )
    config = _with_tokenizer(config, checkpoint.parents[1])
    return Target(config, checkpoint, manifest.meta, manifest.step)


def _of_hf_folder(config: Config, folder: Path) -> Target:
    ranks = config.parallel.world
    for wrong, field, value, rule, cure in (
        (ranks > 1, "parallel", ranks, "one process reads all weights of the folder", "omit parallel"),
        (config.evaluate.ema, "evaluate.ema", True, "a Hugging Face folder has no average", "leave it out"),
        (
            config.precision.fp8 is not None,
            "precision",
            config.precision.name,
            "applies only to Sluice's checkpoints",
            "take bf16",
        ),
    ):
        if wrong:
            raise UserError(field, value, f"{rule}: {folder}", cure)
    _, model, notes = open_model(folder, "evaluate.checkpoint", config.text_only)
    if config.seq_len > model.max_seq_len:
        rule = f"must not exceed max_position_embeddings = {model.max_seq_len} of {folder}"
        raise UserError("seq_len", config.seq_len, rule, f"set seq_len={model.max_seq_len} or less")
    config = _with_tokenizer(replace(config, model=model), folder)
    if config.data.tokenizer is None:
        refuse_tiktoken(folder, "evaluate.checkpoint")
        raise UserError(
            "data.tokenizer",
            None,
            f"{folder} has no tokenizer.json",
            "set data.tokenizer to the tokenizer of the weights",
        )
    return Target(config, folder, None, None, tuple(notes))


def _with_tokenizer(config: Config, folder: Path) -> Config:
    """Returns the configuration. If it names no tokenizer, it gets the tokenizer in `folder`, if there is one."""
    if config.data.tokenizer is not None or not (folder / "tokenizer.json").is_file():
        return config
    return replace(config, data=replace(config.data, tokenizer=str(folder)))
