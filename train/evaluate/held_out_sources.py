"""Which documents of each source count: those held out, where the run has trained on the rest; else all of them.

A source is the run's own if the run knows its path or its very content (so that neither a moved folder nor one that has
grown passes for new). A checkpoint keeps both, with the share that was held out.
"""

from dataclasses import dataclass, replace
from typing import Any

from conf.errors import UserError
from conf.schema import Config
from train.data.corpus import Corpus, CorpusPart
from train.data.dataset import ValidationData
from train.data.mix import Schedule

ALL = 1 << 62
"""More sequences than any source has."""


@dataclass(frozen=True)
class EvaluatedSource:
    """One source and its sequences."""

    name: str
    own: bool
    """The run has trained on it, so that only its held-out documents count."""
    part: CorpusPart
    """The part of the corpus, of whose documents those for validation count."""
    data: ValidationData


def choose_sources(corpus: Corpus, config: Config, held_out: dict[str, Any] | None) -> list[EvaluatedSource]:
    """The sources that get sequences, in the order of the mix. held_out: what the checkpoint says of the run's data."""
    known = {word for source in held_out["sources"] for word in source} if held_out else set()
    wanted = config.evaluate.sequences
    wanted = config.log.validation_sequences if wanted is None else wanted
    counts = Schedule([part.weight for part in corpus.parts]).counts(wanted) if wanted else [ALL] * len(corpus.parts)
    found = []
    for part, count in zip(corpus.parts, counts, strict=True):
        own = part.name in known or part.content in known
        if own and held_out is not None:
            _same_share(config, held_out["fraction"])
        if count:
            part = part if own else replace(part, validation=part.whole)
            data = ValidationData(replace(corpus, parts=[part]), config, count)
            found.append(EvaluatedSource(part.name, own, part, data))
    return found


def _same_share(config: Config, fraction: float) -> None:
    """The share decides which documents are held out: another one would let trained ones in."""
    if config.data.validation_fraction != fraction:
        raise UserError(
            "data.validation_fraction",
            config.data.validation_fraction,
            f"must be {fraction}, with which the run held out documents of the same data",
            "leave it out",
        )
