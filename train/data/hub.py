"""Hugging Face datasets through the optional package `datasets`: hf://NAME[@CONFIG][:SPLIT], split `train` by default.

NAME is a dataset of the hub, a folder saved with save_to_disk, or a folder that load_dataset can read. The package keeps
its own memory-mapped copy, so nothing here holds more than a few rows.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import UserError
from train.data.prepare_progress import ReportProgress
from train.data.reach import hub, offline_reason
from train.data.readers import (
    check_text,
    text_key_of,
)
from train.data.source_files import content_id
from train.program import install_words

HUB_ROWS = 256


@dataclass
class HubSource:
    """One split of a dataset; a document is a row's text."""

    field: str
    name: str
    split: str
    text_key: str
    table: Any
    """A datasets.Dataset."""
    by_content: bool
    """Whether the content of a document decides whether it is held out, and not its row."""

    @property
    def size(self) -> int:
        return int(self.table.data.nbytes)

    def notes(self) -> list[str]:
        return []

    def digest(self, manifests: Path, progress: ReportProgress) -> str:
        way = f"{self.text_key}:content" if self.by_content else self.text_key
        return f"huggingface:{way}:{self.table._fingerprint}:{len(self.table)}"

    def documents(self) -> Iterator[tuple[str, str]]:
        yield from self._read(1)

    def sample(self, limit: int) -> Iterator[tuple[str, str]]:
        yield from self._read(max(1, self.size // limit))

    def _read(self, step: int) -> Iterator[tuple[str, str]]:
        """Every step-th row."""
        rows = range(0, len(self.table), step)
        table = self.table if step == 1 else self.table.select(rows)
        for first, batch in zip(range(0, len(rows), HUB_ROWS), table.with_format("arrow").iter(HUB_ROWS), strict=True):
            for row, value in zip(rows[first : first + HUB_ROWS], batch.column(self.text_key).to_pylist(), strict=True):
                name = f"{self.split}:{row}"
                if text := check_text(value, f"{self.name} {name}", self.text_key, self.field):
                    yield content_id(name, text) if self.by_content else name, text


def open_hub(path: str, text_key: str, key: str, by_content: bool = False) -> HubSource:
    """Load the split. Raises UserError without the package, the network, the dataset, the split or the column."""
    match = re.fullmatch(r"(?:hf://)?(.+?)(?:@([^@:/]+))?(?::([^:/]+))?", path)
    if match is None:
        raise UserError(key, path, "must be hf://NAME[@CONFIG][:SPLIT]", "write it so")
    name, config, split = match[1], match[2], match[3] or "train"
    folder = Path(name).expanduser()
    offline = None if folder.is_dir() else offline_reason()
    try:
        import datasets
    except ImportError as error:
        rule = "needs the Python package datasets, which is not installed"
        raise UserError(key, path, rule, f"{install_words('datasets')}; or give files") from error
    try:
        if any((folder / mark).is_file() for mark in ("dataset_info.json", "dataset_dict.json")):
            table = datasets.load_from_disk(folder)
            table = table[split] if isinstance(table, datasets.DatasetDict) else table
        else:
            table = datasets.load_dataset(str(folder) if folder.is_dir() else name, config, split=split)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        cure = "check name, @CONFIG and :SPLIT; without a network give files, or a folder made by save_to_disk"
        if offline is not None:
            reason = f"{hub()} cannot be reached ({offline}), and the dataset is not in the cache of this machine"
        raise UserError(key, path, f"cannot be loaded: {reason}", cure) from error
    if text_key not in table.column_names:
        rule = f"has no column {text_key!r}, only: {', '.join(table.column_names[:20])}"
        raise UserError(key, path, rule, f"set {text_key_of(key)} to the column of the text")
    return HubSource(key, path, split, text_key, table, by_content)
