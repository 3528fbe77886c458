"""What is evaluated: the checkpoint that the configuration means, and the configuration that fits it. Imports no torch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.schema import Config
from train.checkpoint.manifest import read_manifest
from train.run_folder import RunPaths, resume_point


@dataclass(frozen=True)
class Target:
    """A checkpoint of ours."""

    config: Config
    """With the tokenizer that the checkpoint was trained with, where none is set."""
    checkpoint: Path
    meta: dict[str, Any]
    step: int


def find_target(config: Config) -> Target:
    """Raises UserError where there is no intact checkpoint, or it has no averages and they are wanted."""
    checkpoint = _checkpoint(config)
    manifest = read_manifest(checkpoint)
    if config.evaluate.ema and not manifest.meta["has_ema"]:
        raise UserError(
            "evaluate.ema", True, f"{checkpoint} holds no average of the weights", "train with optim.ema_decay=0.999"
        )
    if config.data.tokenizer is None and (checkpoint.parents[1] / "tokenizer.json").is_file():
        config = replace(config, data=replace(config.data, tokenizer=str(checkpoint.parents[1])))
    return Target(config, checkpoint, manifest.meta, manifest.step)


def _checkpoint(config: Config) -> Path:
    given = config.evaluate.checkpoint
    try:
        found = resume_point(replace(config, resume=given or "auto")).path
    except UserError as error:
        raise UserError("evaluate.checkpoint", error.value, error.rule, "give another checkpoint or run") from error
    if found is None:
        raise UserError(
            "name",
            config.name,
            f"must be a run with a checkpoint; there is none in {RunPaths(config).checkpoints}",
            "give name=RUN, or evaluate.checkpoint=FOLDER",
        )
    return found.absolute()


def check_tokenizer(fingerprint: str, target: Target) -> None:
    """The tokens must mean what they meant in training."""
    if fingerprint != target.meta["tokenizer"]:
        raise UserError(
            "data.tokenizer",
            target.config.data.tokenizer or "trained on the data",
            f"must be the tokenizer that {target.checkpoint} was trained with; its fingerprint differs",
            "set data.tokenizer to that tokenizer.json",
        )
