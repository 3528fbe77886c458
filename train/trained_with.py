"""The tokenizer that a checkpoint was trained with: its tokens mean nothing to another."""

from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.schema import Config
from train.checkpoint.manifest import Manifest
from train.data.tokenizer import Tokenizer, load_tokenizer


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
