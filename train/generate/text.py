"""Converts tokens to text during generation, and writes text."""

import sys
from typing import TextIO

from conf.errors import UserError
from train.data.tokenizer import Tokenizer
from train.show.screens import printable

BROKEN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes a growing list of tokens into pieces of text that end at complete characters.

    If a token ends inside a character, `feed` holds this character back until the next tokens.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._open: list[int] = []
        """Tokens after the last complete character."""
        self._shown = 0
        """Number of characters of `_open`'s text that `feed` has returned already."""

    def feed(self, ids: list[int]) -> str:
        """Add tokens; return new text up to the last complete character."""
        self._open += ids
        text = self._tokenizer.decode(self._open)
        if not text.endswith(BROKEN):
            new = text[self._shown :]
            self._open, self._shown = [], 0
            return new
        new = text[self._shown : -1]
        self._shown = len(text) - 1
        return new

    def finish(self) -> str:
        """Return the text that `feed` has not returned yet."""
        rest = self._tokenizer.decode(self._open)[self._shown :]
        self._open, self._shown = [], 0
        return rest


def write(text: str, stream: TextIO | None = None) -> None:
    """Write text and flush it. A terminal gets no control characters."""
    stream = stream or sys.stdout
    encoding = stream.encoding or "utf-8"
    text = printable(text, encoding) if stream.isatty() else text.encode(encoding, "replace").decode(encoding)
    stream.write(text)
    stream.flush()


def require_utf8(text: str, field: str) -> None:
    """Raise UserError for text that is not UTF-8. field: configuration key."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = ascii(text[max(0, error.start - 20) : error.end + 20])
        raise UserError(field, shown, "is not UTF-8", "convert it (iconv -t UTF-8)") from error
