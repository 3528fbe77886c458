"""Words that mean nothing to readers from other projects: none in names, comments, docstrings or texts of the program."""

import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from conf.schema import ROOT

INSTEAD = {
    "shaken": "perturbed",
    "untold": "inconclusive",
    "ways? (?:back|out)": "combine, dispatch",
    "whoever|of whom": "the caller, the rank",
    "anew": "again",
    "gains?": "norm weight",
    "strangers?": "untrusted",
    "in the place of": "instead of",
    "(?:grouped|matrix|fp8) products?": "GEMM, matmul",
    "gets? on|so to say": "makes progress",
}
"""Patterns of whole words, with the words to use."""
FIELDS = {"untold"}
"""Fields of prove.json, which keep their names."""
FOUND = re.compile(rf"\b(?:{'|'.join(INSTEAD)})\b", re.IGNORECASE)


def pieces(path: Path) -> Iterator[tuple[int, str]]:
    """Names as words, and comments and strings, with their lines."""
    with path.open() as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.NAME and token.string not in FIELDS:
                yield token.start[0], re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", token.string)
            elif token.type in (tokenize.COMMENT, tokenize.STRING):
                yield token.start[0], re.sub(r"\b(?:self|one)\.\w+", "", " ".join(token.string.split()))


def test_the_program_uses_words_that_other_projects_use():
    files = [file for folder in ("conf", "train", "parallel", "cluster") for file in (ROOT / folder).rglob("*.py")]
    found = [
        f"{file.relative_to(ROOT)}:{line} {match[0]}"
        for file in files
        for line, text in pieces(file)
        for match in FOUND.finditer(text)
    ]
    assert found == [], f"use instead: {INSTEAD}"


def test_an_old_word_is_found():
    assert [FOUND.search(text) is not None for text in ("run shaken step", "its way back", "Again", "the norm's gain")] == [
        True, True, False, True,
    ]  # fmt: skip
