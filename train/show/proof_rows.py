"""Builds the rows about mode=prove in report.html, and identifies proofs."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.files import read_plain_json
from train import __version__
from train.metrics.origin import code_version

PROOF_FILE, PROOF_CARD_FILE = "prove.json", "card.md"
"""Files that mode=prove writes: all numbers, and a summary."""


PROVEN_RECIPE = (
    "model",
    "optim",
    "precision",
    "adapter",
    "seq_len",
    "batch_size",
    "data.format",
    "data.mask_documents",
)
PROVEN_LAYOUT = ("parallel", "micro_batch_size")
"""PROVEN_RECIPE and PROVEN_LAYOUT together contain all settings that the result of mode=prove depends on."""


def describe_proven(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what identifies a proven run: recipe, layout, version and commit."""
    commit, modified = code_version()
    hashes = {"recipe": _hash(settings, PROVEN_RECIPE), "layout": _hash(settings, PROVEN_LAYOUT)}
    return hashes | {"version": __version__, "commit": commit, "modified": modified}


def _hash(settings: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    found: dict[str, Any] = {}
    for key in keys:
        value: Any = settings
        for name in key.split("."):
            value = value[name]
        found[key] = value
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def _other(proven: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Returns what differs between the proven run and this run."""
    own = describe_proven(settings)
    return [
        f"{name} {_shown(proven[name])}"
        for name in ("recipe", "layout", "version", "commit")
        if proven[name] != own[name]
    ]


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)[:16]


def report_rows(run_folder: Path, settings: Mapping[str, Any]) -> tuple[str, list[tuple[str, ...]]] | None:
    """Returns a sentence and table rows about prove.json; None without a readable file.

    The sentence says if the proof is for another recipe, layout or code.
    """
    try:
        record = read_plain_json(run_folder / PROOF_FILE)
        verb, proven = "trains" if record["holds"] else "does not train", record.get("proven")
        sentence = f"mode=prove: {record['layout']} {verb} this model, in miniature on {record['ranks']} ranks."
        if proven is None:
            sentence = (
                "mode=prove: this certificate of an older version does not name its recipe: prove this run again."
            )
        elif not settings:
            sentence = f"mode=prove: {record['layout']} {verb} the model of recipe {proven['recipe']}; the folder has no settings of a run."
        elif other := _other(proven, settings):
            sentence = f"mode=prove: this certificate belongs to another run: {', '.join(other)}: prove this run again."
        elif proven["modified"]:
            sentence += " Files of the commit were modified at the time of the proof."
        if first := record["first_difference"]:
            place = f"{first['quantity']} of {first['name']} in check {first['proof']}, step {first['step']}"
            sentence += f" The first difference: {first['phase']}, {place}."
        rows: list[tuple[str, ...]] = [
            (
                each["proof"],
                each["quantity"],
                "failed" if each["failed"] else "holds",
                "not a number" if each["worst"] is None else f"{each['worst']:.2g}",
                f"{each['bound']:.2g}",
                each["reason"],
            )
            for each in record["quantities"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sentence, rows
