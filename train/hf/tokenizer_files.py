"""Tokenizer files of a Hugging Face folder: whether they are those of a run, and those that a run hands on. No torch."""

import json
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.read_json import parse_json, read_json, read_plain_text
from train.data.chat_template import TEMPLATE_FILES
from train.data.tokenizer import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_SETTINGS_FILE = "tokenizer_config.json"


def check_tokenizer(folder: Path, tokenizer: Tokenizer, choice: str | None) -> list[str]:
    """Raise UserError where the run's tokenizer gives other ids than the folder's; returns notes. choice: data.tokenizer."""
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return [
            f"{folder} holds no {TOKENIZER_FILE}, so nobody can tell whether its weights know the tokens of this run"
        ]
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
            f"must be the tokenizer that the weights were trained with, {path}: to another one's ids they mean nothing",
            f"set data.tokenizer={folder}",
        )
    return []


def _meaning(text: str) -> tuple[Any, ...]:
    """What decides on ids: words, merges, added tokens. Two files with the same can differ in spelling."""
    body = parse_json(text)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in body["model"].get("merges", ())]
    added = {(token["id"], token["content"]) for token in body.get("added_tokens", ())}
    words = {(index, word) for word, index in body["model"]["vocab"].items()}
    return words | added, merges


def write_tokenizer(
    folder: Path, tokenizer: Tokenizer, source: Path | None, length: int, template: Path | None = None
) -> None:
    """Write tokenizer.json, and tokenizer_config.json for AutoTokenizer. length: most tokens of a sequence.

    source: a folder whose tokenizer_config.json came with this tokenizer; its chat template and the like are kept. template: the
    folder of a run whose chat template is that of the chats it was tuned on, which goes first.
    """
    for place in (template, source):
        if place is not None and (place / TEMPLATE_FILES["default"]).is_file():
            for name in TEMPLATE_FILES.values():
                if (place / name).is_file():
                    (folder / name).parent.mkdir(exist_ok=True)
                    (folder / name).write_text((place / name).read_text(encoding="utf-8"), encoding="utf-8")
            break
    settings: dict[str, Any] = {}
    if source is not None and (source / TOKENIZER_SETTINGS_FILE).is_file():
        settings = read_json(source / TOKENIZER_SETTINGS_FILE, "data.tokenizer", "correct or remove this file")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,  # training puts none in front of documents
        "clean_up_tokenization_spaces": False,
        **settings,
        "eos_token": tokenizer.eos,
        "model_max_length": length,
    }
    (folder / TOKENIZER_FILE).write_text(tokenizer.json_text, encoding="utf-8")
    (folder / TOKENIZER_SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
