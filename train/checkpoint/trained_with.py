"""Checks whether a checkpoint fits a run: tokenizer, model shape, adapter's base weights."""

import hashlib
import json
from operator import attrgetter
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
"""Model fields that determine names and shapes of tensors."""


def require_model(config: Config, checkpoint: Path, meta: dict[str, Any], adds_indexers: bool = False) -> None:
    """Raise UserError if the checkpoint's tensors have other names or shapes.

    adds_indexers: whether the run may add indexers to dense attention.
    """
    stored = meta.get("config", {}).get("model", {})
    differ = {name: stored[name] for name in SHAPE if stored.get(name, ...) not in (..., getattr(config.model, name))}
    sparse = stored.get("sparse") or {}
    if sparse.get("heads") or (config.model.sparse.heads and not adds_indexers):
        keys = ("heads", "head_dim", "interleaved", "pattern")
        now = config.model.sparse
        differ |= {f"sparse.{key}": sparse[key] for key in keys if sparse.get(key, ...) not in (..., getattr(now, key))}
    if differ:
        raise UserError(
            ", ".join(f"model.{name}" for name in differ),
            ", ".join(str(attrgetter(name)(config.model)) for name in differ),
            f"the model must have the shape of the model in {checkpoint}, which has "
            + ", ".join(f"model.{name} = {value}" for name, value in differ.items()),
            f"set {' '.join(f'model.{name}={json.dumps(value)}' for name, value in differ.items())}, or take another name= "
            "for a new run",
        )


def refuse_mean(config: Config, checkpoint: Path, meta: dict[str, Any]) -> None:
    """Raise UserError for a checkpoint of mode=average (no optimizer state)."""
    if meta.get("averaged"):
        rule = f"cannot resume from {checkpoint}: mode=average wrote it, without optimizer state"
        raise UserError("resume", config.resume, rule, f"set init_from={checkpoint} under another name=")


def tokenizer_of(config: Config, checkpoint: Manifest) -> Tokenizer:
    """Returns the configured tokenizer, or the run's. Raises UserError if the training used another one."""
    run = checkpoint.folder.absolute().parents[1]
    if config.data.tokenizer is None and not (run / "tokenizer.json").is_file():
        raise UserError(
            "data.tokenizer",
            None,
            f"{run} has no tokenizer.json, which is needed for the tokens of {checkpoint.folder.name}",
            "set data.tokenizer to the tokenizer.json of that training",
        )
    choice = config.data.tokenizer or str(run)
    tokenizer = load_tokenizer(choice)
    require_tokenizer(tokenizer.fingerprint, choice, checkpoint.folder, checkpoint.meta)
    return tokenizer


def require_tokenizer(fingerprint: str, choice: str | None, checkpoint: Path, meta: dict[str, Any]) -> None:
    """Raise UserError if the checkpoint was trained with another tokenizer."""
    if meta["tokenizer"] and fingerprint != meta["tokenizer"]:
        raise UserError(
            "data.tokenizer",
            choice or "trained on the data",
            f"must be the tokenizer of {checkpoint}; its fingerprint differs",
            "set data.tokenizer to that tokenizer.json, or use another name= for a new run",
        )


# Identifies the base weights of an adapter, and checks the adapter's settings. No torch.
#
# A checkpoint of an adapter contains a fingerprint of the base weights. It detects most wrong base weights before the
# start. Reading all weights gives a second fingerprint, the mark (train/checkpoint/weights_mark.py). It detects every
# changed value. Checkpoints of earlier versions have no mark.

PLACES, BYTES_OF_PLACE = 16, 4096
"""The fingerprint reads a file at PLACES positions. BYTES_OF_PLACE: number of bytes that it reads at each position."""
SHAPING = ("rank", "targets", "base")
"""Adapter settings that determine parameter shapes and the format of the base weights."""


def describe_base(source: Folder | Path) -> dict[str, str]:
    """Returns a checkpoint's meta entry `base`: path and fingerprint of the base weights. Raises UserError."""
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
    """Raise UserError if checkpoint and run differ in the adapter or its settings (SHAPING)."""
    if config.adapter.on != holds_adapter(meta):
        here, there = "trains an adapter", "whole weights"
        cure = f"set init_from={checkpoint} and another name=, or omit adapter=lora"
        if not config.adapter.on:
            here, there, cure = "trains whole weights", "an adapter alone", "add adapter=lora, or use another name="
        raise UserError("adapter", config.adapter.name, f"{checkpoint} has {there}, and this run {here}", cure)
    stored = {"base": "plain"} | meta.get("config", {}).get("adapter", {})  # older checkpoints lack this key
    now: dict[str, Any] = {"rank": config.adapter.rank, "base": str(config.adapter.base)}
    now["targets"] = [str(target) for target in config.adapter.targets or ()]
    for key in SHAPING if config.adapter.on else ():
        if key in stored and stored[key] != now[key]:
            rule = f"must be {json.dumps(stored[key])}, as in the training of {checkpoint}"
            listed = json.dumps(stored[key], separators=(",", ":")).replace('"', "")
            cure = f"set adapter.{key}={listed}, or use another name= for a new run"
            raise UserError(f"adapter.{key}", now[key], rule, cure)


def require_base(config: Config, checkpoint: Path, meta: dict[str, Any], base: dict[str, str]) -> None:
    """Raise UserError if the checkpoint's adapter was trained with other base weights."""
    known, now = (one.get("weights") for one in (meta["base"], base))
    if meta["base"]["fingerprint"] != base["fingerprint"] or (known and now and known != now):
        raise other_base(config.init_from, checkpoint, meta)


def other_base(init_from: str | None, checkpoint: Path, meta: dict[str, Any]) -> UserError:
    """Returns the UserError for base weights that are not the adapter's."""
    path = meta["base"]["path"]
    rule = f"has other weights than the base of the adapter in {checkpoint}: {path}"
    return UserError("init_from", init_from, rule, f"set init_from={path}, or its copy")


def refuse_adapter(checkpoint: Path, meta: dict[str, Any]) -> None:
    """Raise UserError if the checkpoint contains only an adapter."""
    if holds_adapter(meta):
        rule = f"{checkpoint} has only an adapter for the weights of {meta['base']['path']}"
        cure = "merge the adapter first (mode=export of its run with export.merge=true), and start from the exported folder"
        raise UserError("init_from", checkpoint, rule, cure)
