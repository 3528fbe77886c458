"""What prove.json says, for the report, and of which recipe, layout and code it says it. Imports no torch."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.files import read_plain_json
from train import __version__
from train.metrics.origin import code_version

PROOF_FILE, PROOF_CARD_FILE = "prove.json", "card.md"
"""Every figure; and what of it a reader of the run has to know."""


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
"""Keys that a proof depends on. It draws its own tokens and trains a few steps, whatever data and steps the recipe has."""


def describe_proven(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a proof is of: hashes of recipe and layout, version and commit of this program. settings: all, resolved, as JSON has them."""
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
    """What of this run is another than what was proven."""
    own = describe_proven(settings)
    return [
        f"{name} {_shown(proven[name])}"
        for name in ("recipe", "layout", "version", "commit")
        if proven[name] != own[name]
    ]


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)[:16]


def report_rows(run_folder: Path, settings: Mapping[str, Any]) -> tuple[str, list[tuple[str, ...]]] | None:
    """A sentence and a table for the report; None where there is no certificate that can be read. settings: of the run, which the sentence
    speaks of only where the proof was of the same recipe and layout by the same code.
    """
    try:
        record = read_plain_json(run_folder / PROOF_FILE)
        verb, proven = "trains" if record["holds"] else "does not train", record.get("proven")
        sentence = f"mode=prove: {record['layout']} {verb} this model, in miniature on {record['ranks']} ranks."
        if proven is None:
            sentence = "mode=prove: this certificate is of an older version, and does not say of which recipe: prove this run again."
        elif not settings:
            sentence = f"mode=prove: {record['layout']} {verb} the model of recipe {proven['recipe']}; no settings of a run lie beside it."
        elif other := _other(proven, settings):
            sentence = (
                f"mode=prove: this certificate is not of this run, but of {', '.join(other)}: prove this run again."
            )
        elif proven["modified"]:
            sentence += " Files of the commit had been changed when it was proven."
        if first := record["first_difference"]:
            place = f"{first['quantity']} of {first['name']} in pass {first['proof']}, step {first['step']}"
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
