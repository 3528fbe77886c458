"""Checks the tokenizer of a Hugging Face folder, and writes the tokenizer of an export. No torch."""

import json
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.files import parse_json, read_plain_text
from train.data.tokenizer import (
    GENERATION_FILE,
    SPECIAL_TOKENS_FILE,
    TEMPLATE_FILES,
    TOKENIZER_FILE,
    TOKENIZER_SETTINGS_FILE,
    Tokenizer,
    files_beside,
)

TOKENIZER_CLASS = "PreTrainedTokenizerFast"


def check_tokenizer(folder: Path, tokenizer: Tokenizer, choice: str | None) -> list[str]:
    """Raise UserError if run and folder have different tokenizers. Returns notes."""
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return [f"{folder} has no {TOKENIZER_FILE}, so it is unknown whether its weights fit the tokens of this run"]
    try:
        text = read_plain_text(path)
        same = text == tokenizer.json_text or _meaning(text) == _meaning(tokenizer.json_text)
    except ValueError as error:
        raise UserError("init_from", path, f"cannot be read: {error}", "download it again") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError("init_from", path, f"cannot be read: it lacks {error!r}", "download it again") from error
    if not same:
        raise UserError(
            "data.tokenizer",
            choice or "null (trained on the data)",
            f"must be the tokenizer of the weights, {path}: they do not know the ids of another tokenizer",
            f"set data.tokenizer={folder}",
        )
    return []


def _meaning(text: str) -> tuple[Any, ...]:
    """Return what determines the ids: vocabulary, merges, added tokens."""
    body = parse_json(text)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in body["model"].get("merges", ())]
    added = {(token["id"], token["content"]) for token in body.get("added_tokens", ())}
    words = {(index, word) for word, index in body["model"]["vocab"].items()}
    return words | added, merges


def with_words_of(tokenizer: Tokenizer, run: Path, source: Path | None) -> Tokenizer:
    """Return a run's tokenizer with all its files. source: original folder, with files that the run lacks."""
    kept = files_beside(run)
    if kept.keys() & {SPECIAL_TOKENS_FILE, GENERATION_FILE} or source is None:
        return tokenizer.with_files(kept)
    there, templates = files_beside(source), TEMPLATE_FILES.values()
    if TEMPLATE_FILES["default"] in kept:
        there = {name: text for name, text in there.items() if name not in templates}
    if TOKENIZER_SETTINGS_FILE in there:
        kept = {name: text for name, text in kept.items() if name in templates}
    return tokenizer.with_files(there | kept)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, length: int) -> None:
    """Write all tokenizer files. length: maximum tokens of a sequence."""
    settings: dict[str, Any] = {
        "tokenizer_class": TOKENIZER_CLASS,
        "add_bos_token": False,  # training adds no begin token to documents
        "clean_up_tokenization_spaces": False,
        **tokenizer.settings(TOKENIZER_SETTINGS_FILE),
        "eos_token": tokenizer.eos,
        "model_max_length": length,
    }
    if settings.pop("auto_map", None):  # names code that an export does not have
        settings["tokenizer_class"] = TOKENIZER_CLASS
    tokenizer.with_files(tokenizer.files | {TOKENIZER_SETTINGS_FILE: json.dumps(settings, indent=2) + "\n"}).save(
        folder
    )
