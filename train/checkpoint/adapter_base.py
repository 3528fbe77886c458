"""Which weights an adapter was trained beside, and what it cannot go on without. No torch.

Checkpoints of such a run hold the adapter alone. Their meta says where the base lay and what it was, by a fingerprint: of a checkpoint of
ours by the checksums of its files, of a Hugging Face folder by the headers of its files and samples of their bytes, so that most others are refused
before anything starts; and by a mark of all weights (train/checkpoint/weights_mark.py), which is made while they are read, so that
not a single changed value passes. Checkpoints of earlier versions have no such mark. A folder may have moved.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from conf.disk import cure_of_reading
from conf.errors import UserError
from conf.schema import Config
from train.checkpoint.manifest import holds_adapter, read_manifest
from train.hf.folder import Folder

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
