"""DeepSpeed behaviour that our code copies, against the source of the installed DeepSpeed."""

import ast
import hashlib
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from conf.schema import ROOT
from parallel.zero.private_names import COPIED, READ_FROM


@cache
def sources(file: str) -> dict[str, str]:
    """By class and name, the source of every function of one of DeepSpeed's files."""
    text = (Path(find_spec("deepspeed").origin).parent / file).read_text()
    lines, found = text.splitlines(keepends=True), {}
    for node in ast.parse(text).body:
        owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for function in node.body if owner else [node]:
            if isinstance(function, ast.FunctionDef):
                # ast.get_source_segment splits the whole file anew for each function.
                last = lines[function.end_lineno - 1].encode()[: function.end_col_offset].decode()
                source = "".join([*lines[function.lineno - 1 : function.end_lineno - 1], last])
                found[owner + function.name] = source[function.col_offset :]
    return found


def differing() -> list[str]:
    """What to read again."""
    found = []
    for row in COPIED:
        for name, digest in row.functions.items():
            place = f"{row.owner}.{name}" if row.owner else name
            source = sources(row.file).get(place, "")
            if hashlib.sha256(source.encode()).hexdigest()[:16] != digest:
                found.append(
                    f"read {place} of deepspeed/{row.file} {version('deepspeed')} again, which was read at {READ_FROM}, and see "
                    f"whether {row.copy} still does the same: {row.what}"
                )
    return found


def test_deepspeed_does_what_was_copied():
    assert differing() == []


def test_another_source_is_told_with_the_copy_to_look_at(monkeypatch):
    row = COPIED[0]
    name = next(iter(row.functions))
    monkeypatch.setitem(row.functions, name, "0" * 16)
    (message,) = differing()
    assert name in message and row.copy in message and row.what in message


@pytest.mark.parametrize("row", COPIED, ids=lambda row: f"{Path(row.copy).stem}-{Path(row.file).stem}")
def test_the_copy_is_there(row):
    assert (ROOT / row.copy).is_file() and row.functions
