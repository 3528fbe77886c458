"""Prepares a rank's data, and computes the number of steps for `epochs`."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.comm_ring import got_on
from conf.check import check
from conf.errors import UserError
from conf.schema import Config
from train.data.corpus import build_corpus
from train.data.dataset import TrainingData, ValidationData
from train.data.own_documents import OwnDocuments
from train.data.prepare_progress import ReportProgress, show_progress, silent
from train.data.streamed import StreamedData
from train.data.tokenizer import TEMPLATE_FILES, Tokenizer
from train.optim.schedules import Schedules


@dataclass(frozen=True)
class PreparedData:
    train: TrainingData | StreamedData
    validation: ValidationData
    tokenizer: Tokenizer
    fingerprint: str
    """Hash of everything that determines samples, except seed and seq_len."""
    held_out: dict[str, Any]
    """Identifies the held-out documents: fraction, data.hold_out_by, and each source's name and hash."""
    notes: list[str] = field(default_factory=list)
    """Notes for the user, one sentence each."""
    template_files: dict[str, str] | None = None
    """Jinja templates of the chats, by file name. None without chats."""

    def save_words(self, folder: Path) -> None:
        """Write the tokenizer's files, with the template that rendered the chats."""
        files = self.tokenizer.files
        if self.template_files is not None:
            files = {name: text for name, text in files.items() if name not in TEMPLATE_FILES.values()}
        self.tokenizer.with_files(files | (self.template_files or {})).save(folder)


def prepare(config: Config, progress: ReportProgress = silent) -> PreparedData:
    """Open tokenizer and tokens, and build them if missing. Raises UserError."""

    def tell(stage: str, done: int, total: int) -> None:
        got_on()
        progress(stage, done, total)

    corpus = build_corpus(config, tell)
    train = TrainingData(corpus, config)
    if config.data.source:
        train = StreamedData(OwnDocuments(config, corpus.tokenizer), config)
    validation = ValidationData(corpus, config)
    held_out = {
        "fraction": config.data.validation_fraction,
        "by": config.data.hold_out_by,
        "sources": [[part.name, part.content] for part in corpus.parts],
    }
    notes = corpus.notes + validation.notes
    return PreparedData(train, validation, corpus.tokenizer, corpus.fingerprint, held_out, notes, corpus.template_files)


def with_steps(config: Config) -> Config:
    """Returns the recipe with as many steps as `epochs` need. Raises UserError."""
    assert config.epochs is not None
    with show_progress() as progress:
        corpus = build_corpus(config, progress)
    wanted = TrainingData(corpus, config).sequences * config.epochs
    steps = math.ceil(wanted / config.batch_size)
    while Schedules(replace(config, steps=steps)).samples[-1] < wanted:  # a batch-size ramp starts with small batches
        steps += 1
    if config.optim.warmup_steps >= steps:
        rule = f"is not less than the {steps} steps of epochs = {config.epochs:g} and batch_size = {config.batch_size}: the warm-up would not end"
        cure = f"set a smaller batch_size, for more steps, or optim.warmup_steps={steps // 10}"
        raise UserError("optim.warmup_steps", config.optim.warmup_steps, rule, cure)
    with_steps = replace(config, steps=steps)
    check(with_steps)
    return with_steps
