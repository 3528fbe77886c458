"""The needle test: does the model find one sentence in a long text?

A pass key of five digits is inserted into held-out text. The text ends with a question about this key:
    [text] The pass key is 48213. Remember it. [more text] What is the pass key? The pass key is 48213

The test runs several texts for each length and each depth of the key (0: at the beginning, 1: right before the
question). A key is found if each of its tokens is the model's likeliest. A model that ignores the needle has a mean
loss of at least ln 100000 = 11.5 nats.

The key is encoded separately, so it has the same tokens in needle and answer. The text contains no eos, because a model
may not look back across eos. Imports no torch.

T positions: the text has T + 1 tokens, like a training sequence with seq_len = T.
"""

import math
import random
from dataclasses import dataclass
from typing import Any

from conf.errors import UserError
from conf.schema import Config
from train.data.tokenizer import Tokenizer

NEEDLE_KEYS = 100_000
NEEDLE_TEXTS = 10
"""Number of texts, with different keys, per length and depth."""
NEEDLE_DEPTHS = 0.0, 0.25, 0.5, 0.75, 1.0
"""Relative positions of the pass key in the text."""
GUESSING = math.log(NEEDLE_KEYS)
"""Lower bound of a pass key's mean loss, in nats, for a model that ignores the needle."""
BEFORE, AFTER = "\nThe pass key is", ". Remember it.\n"
NEEDLE_QUESTION = "\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class Needle:
    """Tokens of a needle: sentence with the key, question, key."""

    sentence: list[int]
    question: list[int]
    key: list[int]

    @property
    def size(self) -> int:
        """Number of tokens in a text that are not filler."""
        return 1 + len(self.sentence) + len(self.question) + len(self.key)

    def text(self, start_id: int, filler: list[int], length: int, depth: float) -> list[int]:
        """Returns a text of length + 1 tokens that ends with the pass key.

        - filler: at least length + 1 held-out tokens.
        - depth: relative position of the needle, 0 to 1.
        """
        room = length + 1 - self.size
        place = round(depth * room)
        return [start_id, *filler[:place], *self.sentence, *filler[place:room], *self.question, *self.key]


@dataclass(frozen=True)
class NeedleCell:
    """Result for all texts of one length and one depth."""

    length: int
    depth: float
    texts: int
    found: int
    nats: float
    """Mean loss of a pass key, in nats."""

    def plain(self) -> dict[str, Any]:
        """Returns the object for evaluate.json; nats may be null."""
        return vars(self) | {"nats": self.nats if math.isfinite(self.nats) else None}


def make_needles(config: Config, tokenizer: Tokenizer) -> list[Needle]:
    """Returns needles with random keys. Raises UserError for short lengths."""
    draw = random.Random(config.seed)
    before, after, question = (tokenizer.encode(part) for part in (BEFORE, AFTER, NEEDLE_QUESTION))
    needles = []
    for _ in range(NEEDLE_TEXTS):
        key = tokenizer.encode(f" {draw.randrange(NEEDLE_KEYS):05}")
        needles.append(Needle([*before, *key, *after], question, key))
    least = max(needle.size for needle in needles)
    for length in config.evaluate.needle:
        if length < least:
            rule = f"must be at least {least} with this tokenizer, the number of tokens of needle, question and key"
            raise UserError("evaluate.needle", length, rule, f"use {least} or more")
    return needles


def needle_lines(cells: list[NeedleCell]) -> list[str]:
    """Returns the result table: lines are lengths, columns are depths."""
    if not cells:
        return []
    depths = sorted({cell.depth for cell in cells})
    texts = cells[0].texts
    said = [
        f"pass keys found of {texts}, by length of the text and position of the needle, with the loss of a key in nats (guessing: {GUESSING:.1f})",
        f"{'tokens':>12}{''.join(f'{depth:>14.0%}' for depth in depths)}",
    ]
    for length in sorted({cell.length for cell in cells}):
        row = sorted((cell for cell in cells if cell.length == length), key=lambda cell: cell.depth)
        said.append(f"{length:>12,}" + "".join(f"{_cell(cell):>14}" for cell in row))
    return said


def _cell(cell: NeedleCell) -> str:
    return f"{cell.found} ({cell.nats:.2f})"
