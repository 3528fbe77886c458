"""What a checkpoint was trained with and cannot go on without: its tokenizer and the shape of its model."""

import json
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.schema import Config
from train.checkpoint.manifest import Manifest
from train.data.tokenizer import Tokenizer, load_tokenizer

SHAPE = [
    "vocab_size",
    "hidden",
    "layers",
    "dense_layers",
    "heads",
    "q_rank",
    "kv_rank",
    "nope_head_dim",
    "rope_head_dim",
    "v_head_dim",
    "dense_width",
    "expert_width",
    "experts",
    "shared_experts",
    "mtp_depth",
]
"""Fields of the model section that names and shapes of its tensors follow from."""


def require_model(config: Config, checkpoint: Path, meta: dict[str, Any]) -> None:
    """UserError if the checkpoint's model has other tensors, naming the fields that differ. A checkpoint that does not hold
    its settings is compared tensor by tensor when it is loaded.
    """
    stored = meta.get("config", {}).get("model", {})
    differ = {name: stored[name] for name in SHAPE if stored.get(name, ...) not in (..., getattr(config.model, name))}
    if differ:
        raise UserError(
            ", ".join(f"model.{name}" for name in differ),
            ", ".join(str(getattr(config.model, name)) for name in differ),
            f"the model must have the shape of the one in {checkpoint}, which has "
            + ", ".join(f"model.{name} = {value}" for name, value in differ.items()),
            f"set {' '.join(f'model.{name}={json.dumps(value)}' for name, value in differ.items())}, or take another name= "
            "for a new run",
        )


def refuse_mean(config: Config, checkpoint: Path, meta: dict[str, Any]) -> None:
    """UserError for a checkpoint that no optimizer wrote."""
    if meta.get("averaged"):
        rule = f"cannot go on from {checkpoint}, which mode=average wrote: a mean of weights has no optimizer's state"
        raise UserError("resume", config.resume, rule, f"set init_from={checkpoint} under another name=")


def tokenizer_of(config: Config, checkpoint: Manifest) -> Tokenizer:
    """The one that is set, else the one in the run's folder. Raises UserError if neither is that of the training."""
    run = checkpoint.folder.absolute().parents[1]
    if config.data.tokenizer is None and not (run / "tokenizer.json").is_file():
        raise UserError(
            "data.tokenizer",
            None,
            f"{run} holds no tokenizer.json, without which the tokens of {checkpoint.folder.name} are only numbers",
            "set data.tokenizer to the tokenizer.json of that training",
        )
    choice = config.data.tokenizer or str(run)
    tokenizer = load_tokenizer(choice)
    require_tokenizer(tokenizer.fingerprint, choice, checkpoint.folder, checkpoint.meta)
    return tokenizer


def require_tokenizer(fingerprint: str, choice: str | None, checkpoint: Path, meta: dict[str, Any]) -> None:
    """UserError if the tokenizer at hand is another one. choice: data.tokenizer, None for one trained on the data."""
    if fingerprint != meta["tokenizer"]:
        raise UserError(
            "data.tokenizer",
            choice or "trained on the data",
            f"must be the tokenizer that {checkpoint} was trained with; its fingerprint differs",
            "set data.tokenizer to that tokenizer.json, or take another name= for a new run",
        )
