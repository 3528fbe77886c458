"""What a checkpoint was trained with and cannot go on without: its tokenizer and the shape of its model."""

import hashlib
import json
from pathlib import Path
from typing import Any

from conf.disk import cure_of_reading
from conf.errors import UserError
from conf.schema import Config
from train.checkpoint.manifest import Manifest, holds_adapter, read_manifest
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.hf.folder import Folder

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
    """UserError if the tokenizer at hand is another one. choice: data.tokenizer, None for one trained on the data. A loop of the user's own
    may have had token ids alone, and its checkpoint takes any.
    """
    if meta["tokenizer"] and fingerprint != meta["tokenizer"]:
        raise UserError(
            "data.tokenizer",
            choice or "trained on the data",
            f"must be the tokenizer that {checkpoint} was trained with; its fingerprint differs",
            "set data.tokenizer to that tokenizer.json, or take another name= for a new run",
        )


# Which weights an adapter was trained beside, and what it cannot go on without. No torch.
#
# Checkpoints of such a run hold the adapter alone. Their meta says where the base lay and what it was, by a fingerprint: of a checkpoint of
# ours by the checksums of its files, of a Hugging Face folder by the headers of its files and samples of their bytes, so that most others are refused
# before anything starts; and by a mark of all weights (train/checkpoint/weights_mark.py), which is made while they are read, so that
# not a single changed value passes. Checkpoints of earlier versions have no such mark. A folder may have moved.

PLACES, BYTES_OF_PLACE = 16, 4096
"""How many places of a file its fingerprint looks at, from the first byte to the last, and how much of each."""
SHAPING = ("rank", "targets", "base")
"""Keys of the adapter section that the shapes of its parameters follow from, and what it is trained beside."""


def describe_base(source: Folder | Path) -> dict[str, str]:
    """The `base` of a checkpoint's meta. source: a folder with its headers read, or a checkpoint of ours. Raises UserError where
    a file cannot be read.
    """
    found = hashlib.sha256()
    if isinstance(source, Path):
        found.update(json.dumps(sorted(read_manifest(source).files.items())).encode())
        return {"path": str(source.absolute()), "fingerprint": found.hexdigest()}
    found.update(json.dumps(sorted((name, *vars(at).values()) for name, at in source.stored.items())).encode())
    for file in sorted({at.file for at in source.stored.values()}):
        try:
            with open(source.path / file, "rb") as opened:
                last = opened.seek(0, 2) - BYTES_OF_PLACE
                for number in range(PLACES):
                    opened.seek(max(0, last * number // (PLACES - 1)))
                    found.update(opened.read(BYTES_OF_PLACE))
        except OSError as error:
            raise source.refuse(f"{file} cannot be read: {error}", cure_of_reading(error)) from error
    return {"path": str(source.path.absolute()), "fingerprint": found.hexdigest()}


def require_adapter(config: Config, checkpoint: Path, meta: dict[str, Any]) -> None:
    """UserError unless both the checkpoint and the run are of whole weights, or of adapters of one shape."""
    if config.adapter.on != holds_adapter(meta):
        here, there = "trains an adapter", "whole weights"
        cure = f"set init_from={checkpoint} and another name=, or leave adapter=lora out"
        if not config.adapter.on:
            here, there, cure = "trains whole weights", "an adapter alone", "add adapter=lora, or take another name="
        raise UserError("adapter", config.adapter.name, f"{checkpoint} holds {there}, and this run {here}", cure)
    stored = {"base": "plain"} | meta.get("config", {}).get("adapter", {})  # older checkpoints know of one
    now: dict[str, Any] = {"rank": config.adapter.rank, "base": str(config.adapter.base)}
    now["targets"] = [str(target) for target in config.adapter.targets or ()]
    for key in SHAPING if config.adapter.on else ():
        if key in stored and stored[key] != now[key]:
            rule = f"must be {json.dumps(stored[key])}, with which {checkpoint} was trained"
            listed = json.dumps(stored[key], separators=(",", ":")).replace('"', "")
            cure = f"set adapter.{key}={listed}, or take another name= for a new run"
            raise UserError(f"adapter.{key}", now[key], rule, cure)


def require_base(config: Config, checkpoint: Path, meta: dict[str, Any], base: dict[str, str]) -> None:
    """UserError unless the adapter in the checkpoint was trained beside this base."""
    known, now = (one.get("weights") for one in (meta["base"], base))
    if meta["base"]["fingerprint"] != base["fingerprint"] or (known and now and known != now):
        raise other_base(config.init_from, checkpoint, meta)


def other_base(init_from: str | None, checkpoint: Path, meta: dict[str, Any]) -> UserError:
    """For weights that the adapter in a checkpoint was not trained beside."""
    path = meta["base"]["path"]
    rule = f"holds other weights than those that the adapter in {checkpoint} was trained beside: {path}"
    return UserError("init_from", init_from, rule, f"set init_from={path}, or its copy")


def refuse_adapter(checkpoint: Path, meta: dict[str, Any]) -> None:
    """UserError for a checkpoint that a run would start from and that holds an adapter alone."""
    if holds_adapter(meta):
        rule = f"{checkpoint} holds an adapter alone, beside the weights of {meta['base']['path']}"
        cure = "merge it into them first, by mode=export of its run with export.merge=true, and start from that folder"
        raise UserError("init_from", checkpoint, rule, cure)
