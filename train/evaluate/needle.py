"""The needle test: does the model find one sentence in a long text?

A pass key of five digits stands somewhere in text of the held-out documents, and the text ends with a question for it:

    [text] The pass key is 48213. Remember it. [more text] What is the pass key? The pass key is 48213

For each length of the text and each depth of the key (0: at the beginning, 1: right before the question) several texts are made, with keys
of their own. A key counts as found where the model, token by token, holds the right one likeliest, as greedy generation would.
Beside it stands how many nats the key costs the model: keys are drawn evenly from 100,000, so that whoever does not look
at the needle pays ln 100000 = 11.5 on average, at the least. So a model too weak to name a key may still be seen to look.

The key is encoded apart from what is around it, with the same tokens in needle and answer, so that any tokenizer will do. The text
has no ends of documents in it, behind which a model may have learnt not to look. Imports no torch.

T positions: the text has T + 1 tokens, as a sequence of training with seq_len = T has.
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
"""Texts of each length and depth, each with a key of its own."""
NEEDLE_DEPTHS = 0.0, 0.25, 0.5, 0.75, 1.0
"""Where the key stands in the text, 0 at the beginning, 1 right before the question."""
GUESSING = math.log(NEEDLE_KEYS)
"""Nats that a key costs on average, at least, without a look at the needle."""
BEFORE, AFTER = "\nThe pass key is", ". Remember it.\n"
NEEDLE_QUESTION = "\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class Needle:
    """A key and what stands around it, in tokens."""

    sentence: list[int]
    question: list[int]
    key: list[int]

    @property
    def size(self) -> int:
        """Tokens besides the text, the start token among them."""
        return 1 + len(self.sentence) + len(self.question) + len(self.key)

    def text(self, start_id: int, filler: list[int], length: int, depth: float) -> list[int]:
        """length + 1 tokens of which the last ones are the key. filler: that many tokens or more."""
        room = length + 1 - self.size
        place = round(depth * room)
        return [start_id, *filler[:place], *self.sentence, *filler[place:room], *self.question, *self.key]


@dataclass(frozen=True)
class NeedleCell:
    """All texts of one length and one depth."""

    length: int
    depth: float
    texts: int
    found: int
    nats: float
    """Mean loss of a key."""

    def plain(self) -> dict[str, Any]:
        """The result as evaluate.json has it."""
        return vars(self) | {"nats": self.nats if math.isfinite(self.nats) else None}


def make_needles(config: Config, tokenizer: Tokenizer) -> list[Needle]:
    """One for each text of a cell; the same keys for every cell. Raises UserError where a length has no room for them."""
    draw = random.Random(config.seed)
    before, after, question = (tokenizer.encode(part) for part in (BEFORE, AFTER, NEEDLE_QUESTION))
    needles = []
    for _ in range(NEEDLE_TEXTS):
        key = tokenizer.encode(f" {draw.randrange(NEEDLE_KEYS):05}")
        needles.append(Needle([*before, *key, *after], question, key))
    least = max(needle.size for needle in needles)
    for length in config.evaluate.needle:
        if length < least:
            rule = f"must be {least} or more with this tokenizer: so many tokens have needle, question and key"
            raise UserError("evaluate.needle", length, rule, f"take {least} or more")
    return needles


def needle_lines(cells: list[NeedleCell]) -> list[str]:
    """For a person: a line per length, a column per depth."""
    if not cells:
        return []
    depths = sorted({cell.depth for cell in cells})
    texts = cells[0].texts
    said = [
        f"keys found of {texts}, by length and depth of the needle, and nats of a key (without a look at it: {GUESSING:.1f})",
        f"{'tokens':>12}{''.join(f'{depth:>14.0%}' for depth in depths)}",
    ]
    for length in sorted({cell.length for cell in cells}):
        row = sorted((cell for cell in cells if cell.length == length), key=lambda cell: cell.depth)
        said.append(f"{length:>12,}" + "".join(f"{_cell(cell):>14}" for cell in row))
    return said


def _cell(cell: NeedleCell) -> str:
    return f"{cell.found} ({cell.nats:.2f})"
