"""mode=show_data: prints chats with the learnt text in green, and totals."""

import numpy as np
from rich.table import Table
from rich.text import Text

from conf.errors import EXIT_OK
from conf.schema import Config
from conf.screen import Terminal
from conf.words import harmless
from train.data.corpus import CorpusPart, build_corpus
from train.data.dataset import TrainingData
from train.data.packing import Documents
from train.data.prepare_progress import show_progress
from train.data.tokenizer import Tokenizer

SHOWN_CHATS = 3
SHOWN_TOKENS = 400
"""Maximum number of tokens that are printed of an example."""


def show_data(config: Config) -> int:
    """Prints three examples and the totals. Starts no ranks. Raises UserError."""
    with show_progress() as progress:
        corpus = build_corpus(config, progress)
    terminal = Terminal()
    terminal.print("Learnt tokens are green and underlined.")
    for part in corpus.parts:
        terminal.rule(Text(harmless(part.name)))
        for number in _spread(len(part.train)):
            terminal.print(_example(part.train, number, corpus.tokenizer))
            terminal.print()
    terminal.print(_totals(corpus.parts, TrainingData(corpus, config), config))
    for note in corpus.notes:
        terminal.print(note)
    return EXIT_OK


def _spread(count: int) -> list[int]:
    """Returns the indices of the chats to show, spread evenly."""
    return sorted({count * place // SHOWN_CHATS for place in range(SHOWN_CHATS)}) if count else []


def _example(documents: Documents, number: int, tokenizer: Tokenizer) -> Text:
    start, length = int(documents.starts_D[number]), int(documents.lengths_D[number])
    assert documents.supervised is not None
    shown = min(length, SHOWN_TOKENS)
    ids_N, learnt_N = documents.tokens[start : start + shown], documents.supervised[start : start + shown] > 0
    text = Text()
    for piece in np.split(np.arange(shown), np.flatnonzero(np.diff(learnt_N)) + 1):
        style = "green underline" if learnt_N[piece[0]] else ""
        text.append(harmless(tokenizer.decode(ids_N[piece].tolist())), style)
    if shown < length:
        text.append(f" ... and {length - shown} tokens more")
    return text


def _totals(parts: list[CorpusPart], data: TrainingData, config: Config) -> Table:
    table = Table("source", "chats", "held out", "tokens", "learnt", "longest")
    for part in parts:
        table.add_row(
            harmless(part.name),
            f"{len(part.train)}",
            f"{len(part.validation)}",
            f"{int(part.train.lengths_D.sum())}",
            f"{learnt_share(part.train):.1%}",
            f"{int(part.whole.lengths_D.max())}",
        )
    room, tokens = data.sequences * (config.seq_len + 1), sum(int(part.train.lengths_D.sum()) for part in parts)
    table.caption = (
        f"{data.sequences:.0f} sequences of {config.seq_len} positions, {tokens / room:.1%} full; "
        f"an epoch is {data.sequences / config.batch_size:.4g} steps of {config.batch_size}"
    )
    return table


def learnt_share(documents: Documents) -> float:
    """Returns the fraction of the tokens that are learnt."""
    assert documents.supervised is not None
    spans = zip(documents.starts_D.tolist(), documents.lengths_D.tolist(), strict=True)
    learnt = sum(int(documents.supervised[start + 1 : start + length].sum()) for start, length in spans)
    return learnt / max(1, int(documents.lengths_D.sum()))
