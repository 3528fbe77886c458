"""Builds README.md of an exported folder: the model card, from settings and measured figures.

"Before you publish" lists unknown facts. The card contains no local paths.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from conf.check import OF_STDLIB
from conf.files import read_json
from conf.schema import Config, ModelFamily
from train.checkpoint.manifest import Manifest
from train.data.sources import STDLIB
from train.hf.families import FAMILIES
from train.metrics.jsonl import read_heads
from train.model.count import count_parameters

CARD_FILE = "README.md"
CARD_HEAD = {"library_name": "transformers", "pipeline_tag": "text-generation"}
TAGS = ["mixture-of-experts", "sluice"]
"""Tags in addition to the model family's tag."""
MAIN = ("seed", "seq_len", "steps", "batch_size")
UNFINISHED = "TO BE FILLED IN"
"""Placeholder for facts that only the author knows."""


def _use(loader: str) -> list[str]:
    """Returns the section on loading. loader: transformers class; may be empty."""
    if not loader:
        return ["transformers has no class for these names; serving engines that know the released model read them.\n"]
    return [
        f"```python\nfrom transformers import {loader}, AutoTokenizer\n\n"
        f'model = {loader}.from_pretrained("PATH_OR_NAME")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_NAME")\n```\n'
    ]


def _head(family: ModelFamily) -> dict[str, Any]:
    """Returns the card's YAML front matter for the Hugging Face Hub."""
    return CARD_HEAD | {"tags": [FAMILIES[family].model_types[0], *TAGS]}


def model_card(config: Config, checkpoint: Manifest, family: ModelFamily, notes: list[str], length: int) -> str:
    """Returns the card.

    notes: sentences about what transformers computes differently. length: maximum number of tokens in a sequence.
    """
    counts, step = count_parameters(config.model), checkpoint.step
    folder, settings = checkpoint.folder.absolute(), checkpoint.meta.get("config", {})
    weights = "the moving average of the weights" if config.export.ema else "the weights themselves"
    parts = [
        f"---\n{yaml.safe_dump(_head(family), sort_keys=False)}---\n",
        f"# {config.name}\n",
        f"A language model of the DeepSeek-V3 architecture with {_short(counts.total)} parameters ({_short(counts.active)} per token), and {_count(config.model.mtp_depth, 'module')} for multi-token prediction. Trained with Sluice; step {step:,}, {weights}, as "
        f"{config.export.dtype}. Sequences have up to {length:,} tokens.\n",
        "## Use\n",
        *_use(FAMILIES[family].loader),
        "It is a base model: it continues a text, and was not trained to follow instructions.\n",
        *(f"On transformers: {note.removeprefix('note: ')}.\n" for note in notes),
        "## Figures\n",
        *_table(("", "", ""), _figures(folder, step, config)),
        "## Training\n",
        *_table(("", ""), _recipe(config, settings, checkpoint.meta)),
        "<details><summary>All values of model, optimizer and precision</summary>\n",
        f"```yaml\n{yaml.safe_dump(_sections(settings), sort_keys=False)}```\n\n</details>\n",
        "## Before you publish\n",
        f"- License: {UNFINISHED} (`license:` in the head of this file). It must agree with that of the training text.",
        f"- Training text: {UNFINISHED}. Sources, languages, dates, and removed parts.",
        f"- Limits and risks: {UNFINISHED}. The model was not examined for bias, harm or private data in its text.\n",
    ]
    return "\n".join(parts)


def _figures(checkpoint: Path, step: int, config: Config) -> Iterator[tuple[str, str, str]]:
    """Yields name, value and meaning of figures at the exported step."""
    run = checkpoint.parents[1]
    file = run / "metrics.jsonl"
    heads = [head for head in read_heads(file) if head.get("step") == step] if file.is_file() else []
    head = heads[-1] if heads else {}
    for name, meaning in (
        ("main_loss", "training loss of the next token in this step, nats per token"),
        ("validation_loss", "loss of the next token on held-out text, nats per token"),
        ("validation_bits_per_byte", "bits per byte of held-out text, comparable between tokenizers"),
    ):
        if (
            math.isfinite(value := head.get(name, math.nan)) and not config.export.ema
        ):  # metrics.jsonl has no losses of averaged weights
            yield name, f"{value:.4f}", meaning
    yield from _evaluated(run / "evaluate.json", checkpoint, "ema" if config.export.ema else "master")


def _evaluated(file: Path, checkpoint: Path, weights: str) -> Iterator[tuple[str, str, str]]:
    """Yields name, value and meaning of results of mode=evaluate for these weights."""
    found = read_json(file, "name", "remove it; mode=evaluate writes it again") if file.is_file() else {}
    if (found.get("checkpoint"), found.get("weights")) != (str(checkpoint), weights):
        return
    for source in found["sources"]:
        if source["bits_per_byte"] is not None:
            meaning = f"bits per byte of {_name(source['name'])}, {source['documents']} documents, {source['tokens']:,} tokens"
            yield "bits_per_byte", f"{source['bits_per_byte']:.4f}", meaning
    for task, metrics in found["tasks"].items():
        for metric, value in metrics.items():
            yield f"{task}, {metric}", f"{value:.4f}", "lm-evaluation-harness"


def _recipe(config: Config, settings: dict[str, Any], meta: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "tokens", f"{meta['samples'] * meta['seq_len']:,}"
    yield from ((name, str(settings[name])) for name in MAIN if name in settings)
    yield "training text", ", ".join(_sources(config))
    if "precision" in settings:
        yield "precision", settings["precision"]["name"]
        yield "learning rate", f"{settings['optim']['lr']:g}"


def _sources(config: Config) -> list[str]:
    data = config.data
    if data.mix:
        return [f"{_name(source.path) or STDLIB} (weight {source.weight:g})" for source in data.mix]
    return [STDLIB if not data.path and data.format in OF_STDLIB else _name(data.path or UNFINISHED)]


def _sections(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the sections model, optim and precision, without local paths."""
    return {name: settings[name] for name in ("model", "optim", "precision") if name in settings}


def _name(path: str) -> str:
    """Returns the name of a data source, without a local path."""
    return path if path.startswith("hf://") else Path(path).name


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> list[str]:
    found = list(rows)
    if not found:
        return ["No measurements at this step; `mode=evaluate` measures a checkpoint.\n"]
    lines = [head, ("---",) * len(head), *found]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def _short(number: float) -> str:
    """Formats a number with a suffix, such as 671B or 33M."""
    for size, suffix in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.4g}{suffix}"
    return f"{number:,.0f}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"
