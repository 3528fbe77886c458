"""JSON of a file that a user gives, read in one place: whatever is in it, the user gets a rule and no traceback."""

import json
from pathlib import Path
from typing import Any

from conf.disk import cure_of_reading
from conf.errors import UserError

LARGEST_FILE = 128 << 20
"""Bytes of a file, at most. The index of DeepSeek-V3's 91,991 tensors has 9 MB, tokenizers of large vocabularies 10 to 40."""
TYPE_NAMES = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}


def read_json(path: Path, field: str, cure: str, kind: type = dict, value: object = None) -> Any:
    """The content of a file, of that kind. Raises UserError(field, value or else the path, what is wrong, cure).

    cure: of wrong content; a disk that refuses has its own.
    """
    try:
        return parse_json(read_plain_text(path), kind)
    except ValueError as error:
        if isinstance(error.__cause__, OSError):
            cure = cure_of_reading(error.__cause__)
        raise UserError(field, value or path, f"{path.name} cannot be read: {error}", cure) from error


def read_plain_text(path: Path) -> str:
    """The text of a plain file. Raises ValueError, in words for a user."""
    try:
        if not path.is_file():
            raise ValueError("it is no plain file" if path.exists() else "no such file")
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise ValueError(f"it has {size} bytes, and {LARGEST_FILE} are the most that such a file needs")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 text: {error.reason} at byte {error.start}") from error


def parse_json(text: str, kind: type = dict) -> Any:
    """The value of that kind that a text holds. Raises ValueError, in words for a user."""
    try:
        body = json.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deep") from None
    except ValueError as error:  # broken JSON, or a number of thousands of digits
        raise ValueError(f"it is no JSON: {error}") from error
    if not isinstance(body, kind):
        raise ValueError(f"it must hold {TYPE_NAMES[kind]}, and holds {TYPE_NAMES.get(type(body), 'a number')}")
    return body
