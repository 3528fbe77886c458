"""Writes evaluate.json and prints its table.

    name, checkpoint, step          run name, folder of the weights, optimizer steps so far (null: Hugging Face)
    weights                         master, or ema (the moving average of the master weights)
    precision, seq_len              settings of the evaluation
    total                           figures of all sources together, see below
    sources                         one object per source: name, documents (held out, or all), and the keys of total
    needle                          one object per length and depth: length, depth, texts, found (number of texts whose
                                    key the model finds), nats (mean loss of a key), see needle.py
    answers                         null, or scores of answers to held-out questions (answers.py): questions, scores
                                    (of, rouge_l, loss) and examples
    tasks                           task -> metric -> number, as lm-evaluation-harness names them

Keys of total and of each source:

    sequences, tokens, text_bytes   numbers of sequences, of target tokens, and of the targets' bytes as text
    loss                            nats per token of the main model, as validation_loss in metrics.jsonl
    perplexity                      e to the power of the loss
    bits_per_byte                   loss in bits per byte of text; null if the targets are not text
    positions                       one object per range of positions, none for chats: first, last (from 1), loss
    mtp                             one object per depth, none for chats: depth, loss (as mtp_loss in metrics.jsonl),
                                    and agreement, the fraction of positions where the MTP module and the main model
                                    predict the same token

The run has trained on a source if the checkpoint records its path or content hash. From such a source, the evaluation
reads only the documents that the recorded fraction holds out. From other sources, it reads all documents.
"""

import json
import math
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from conf.errors import UserError
from conf.files import atomic_write_text
from conf.schema import Config, HoldOutBy
from train.data.corpus import Corpus, CorpusPart
from train.data.dataset import Schedule, ValidationData
from train.evaluate.answers import JudgedAnswers
from train.evaluate.needle import NeedleCell, needle_lines
from train.loop.validation import Sums
from train.model.deepseek import DeepSeekV3
from train.model.sequence import Positions

# The forward pass that computes the loss also measures the loss by position and the predictions of the MTP modules.
#
# Position i (counted from 1) sees i tokens and predicts the next token. If a model uses long text, its loss falls with
# the position. If its usable context is shorter than the text, its loss rises at late positions. Ranges of positions
# end at seq_len, at half of seq_len, at a quarter and so on.
#
# MTP depth k at position i and the main model at position i + k predict the same token. Greedy speculative decoding
# accepts a draft token exactly if the main model predicts it too. So the agreement on held-out text estimates the
# acceptance rate of depth k (paper 5.4.3: 85 to 90 % for the second token).
#
# Shapes: B sequences, S = T + 1 tokens, T positions (if ranks split the sequences: this rank's positions), D width, V
# vocabulary, N positions of all sequences, flattened.

RANGES = 6
"""Maximum number of position ranges, each of which gets a separate loss."""
SHORTEST = 32
"""Minimum number of positions in a range, unless the sequence has only one range."""


def position_ranges(seq_len: int) -> list[range]:
    """Returns ranges of positions: the last half, the quarter before it, and so on."""
    ends = [seq_len >> halvings for halvings in reversed(range(RANGES))]
    return [range(*ends) for ends in pairwise([0, *(end for end in ends if end >= SHORTEST or end == seq_len)])]


class ObservedChunk:
    """Measures losses and predictions on a model's last chunk."""

    def __init__(self, depths: int, seq_len: int, last: DeepSeekV3 | None):
        """last: the chunk with the output head; None without one."""
        self._ends = torch.tensor([positions.stop for positions in position_ranges(seq_len)])
        self._sums = torch.zeros(len(self._ends) + 2 * depths, dtype=torch.float64)
        if last is not None:
            last.observer = partial(self._observe, last)

    def take(self) -> Tensor:
        """Returns the sums of the latest forward pass as one vector:

        each range of positions    summed loss of the targets in nats
        each MTP depth             summed loss of the targets in nats; number of positions where the MTP module and
                                   the main model predict the same token
        """
        return self._sums

    @torch.no_grad()
    def _observe(self, last: DeepSeekV3, states: list[Tensor], tokens_BS: Tensor, positions: Positions) -> None:
        named_BT, nats_BT = read(last, states[0], positions.take(tokens_BS, 1))
        sums = list(self._by_range(nats_BT, positions))
        named_BT = _of_whole_sequences(named_BT, positions) if len(states) > 1 else named_BT
        for depth, hidden_BTD in enumerate(states[1:], 1):
            left = positions.shorter(depth)
            draft_BT, nats_BT = read(last, hidden_BTD, left.take(tokens_BS, depth + 1))
            sums += [nats_BT.sum(dtype=torch.float64), (draft_BT == left.take(named_BT, depth)).sum()]
        self._sums = torch.stack([each.double() for each in sums])

    def _by_range(self, nats_BT: Tensor, positions: Positions) -> Tensor:
        nats_T = nats_BT.sum(0, dtype=torch.float64)
        range_T = torch.bucketize(here(positions, nats_T.device), self._ends.to(nats_T.device), right=True)
        return nats_T.new_zeros(len(self._ends)).index_add_(0, range_T, nats_T)


def here(positions: Positions, device: torch.device) -> Tensor:
    """Returns the indices (T,) of this rank's positions, from 0."""
    return torch.cat([torch.arange(piece.start, piece.stop, device=device) for piece in positions.here])


def read(last: DeepSeekV3, hidden_BTD: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the likeliest token at each position, and -log p of the target in nats, fp32.

    hidden_BTD may be (..., D), with targets_BT (...).
    """
    head_VD, chunk = last.head.weight.to(hidden_BTD.dtype), last.config.loss_chunk
    named, nats = [], []
    for hidden_ND, targets_N in zip(
        hidden_BTD.flatten(0, -2).split(chunk), targets_BT.flatten().split(chunk), strict=True
    ):
        logits_NV = (hidden_ND @ head_VD.T).float()
        named.append(logits_NV.argmax(-1))
        nats.append(logits_NV.logsumexp(-1) - logits_NV.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1))
    return torch.cat(named).view(targets_BT.shape), torch.cat(nats).view(targets_BT.shape)


def _of_whole_sequences(own_BT: Tensor, positions: Positions) -> Tensor:
    """Returns the values at all positions of the sequences. Ranks that share a sequence exchange their values."""
    if positions.share is None:
        return own_BT
    rows = [len(piece) for piece in positions.pieces]
    return torch.cat(positions.share.gather_begin(own_BT.unsqueeze(-1), rows).wait(), 1).squeeze(-1)


ALL = 1 << 62
"""Used as the number of sequences if all sequences of a source are evaluated."""


@dataclass(frozen=True)
class EvaluatedSource:
    """A data source, and its sequences that are evaluated."""

    name: str
    own: bool
    """Whether the run trained on the source; then only held-out documents count."""
    part: CorpusPart
    """Part of the corpus whose validation documents are read."""
    data: ValidationData


def choose_sources(corpus: Corpus, config: Config, held_out: dict[str, Any] | None) -> list[EvaluatedSource]:
    """Returns the sources with sequences to evaluate, in data.mix's order."""
    known = {word for source in held_out["sources"] for word in source} if held_out else set()
    wanted = config.evaluate.sequences
    wanted = config.log.validation_sequences if wanted is None else wanted
    counts = Schedule([part.weight for part in corpus.parts]).counts(wanted) if wanted else [ALL] * len(corpus.parts)
    found = []
    for part, count in zip(corpus.parts, counts, strict=True):
        own = part.name in known or part.content in known
        if own and held_out is not None:
            _same_side(config, held_out)
        if count:
            part = part if own else replace(part, validation=part.whole)
            data = ValidationData(replace(corpus, parts=[part]), config, count)
            found.append(EvaluatedSource(part.name, own, part, data))
    return found


def _same_side(config: Config, held_out: dict[str, Any]) -> None:
    """Raise UserError if `config` does not hold out the same documents as the run."""
    for key, was in (
        ("validation_fraction", held_out["fraction"]),
        ("hold_out_by", held_out.get("by", HoldOutBy.name)),
    ):
        if getattr(config.data, key) != was:
            rule = f"must be {was}, as in the run, which held out documents of the same data"
            raise UserError(f"data.{key}", getattr(config.data, key), rule, f"set data.{key}={was}")


EVALUATION_FILE = "evaluate.json"


@dataclass(frozen=True)
class Evaluation:
    """Results of one call of mode=evaluate."""

    name: str
    checkpoint: Path
    step: int | None
    weights: str
    precision: str
    seq_len: int
    sources: list[tuple[EvaluatedSource, Sums]]
    needle: list[NeedleCell] = field(default_factory=list)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: JudgedAnswers | None = None

    def plain(self) -> dict[str, Any]:
        """Returns the object that evaluate.json stores."""
        rows = [
            {"name": source.name, "documents": _which(source)} | figures(sums, self.seq_len)
            for source, sums in self.sources
        ]
        return {
            "name": self.name,
            "checkpoint": str(self.checkpoint),
            "step": self.step,
            "weights": self.weights,
            "precision": self.precision,
            "seq_len": self.seq_len,
            "total": figures(sum((sums for _, sums in self.sources), Sums()), self.seq_len),
            "sources": rows,
            "needle": [cell.plain() for cell in self.needle],
            "tasks": self.tasks,
            "answers": self.answers and self.answers.plain(),
        }

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / EVALUATION_FILE, json.dumps(self.plain(), indent=1, allow_nan=False) + "\n")
        return folder / EVALUATION_FILE


def figures(sums: Sums, seq_len: int) -> dict[str, Any]:
    """Computes the figures of evaluate.json from sums over tokens."""
    ranges = position_ranges(seq_len) if sums.more else []
    by_range, by_depth = sums.more[: len(ranges)], sums.more[len(ranges) :]
    mtp = []
    for depth, (nats, agreed) in enumerate(zip(by_depth[::2], by_depth[1::2], strict=True), 1):
        positions = sums.sequences * (seq_len - depth)
        mtp.append({"depth": depth, "loss": _finite(nats / sums.tokens), "agreement": agreed / positions})
    return {
        "sequences": sums.sequences,
        "tokens": sums.tokens,
        "text_bytes": sums.text_bytes,
        "loss": _finite(sums.loss),
        "perplexity": _finite(math.exp(min(sums.loss, 700.0))),
        "bits_per_byte": _finite(sums.bits_per_byte),
        "positions": [
            {"first": each.start + 1, "last": each.stop, "loss": _finite(nats / (sums.sequences * len(each)))}
            for each, nats in zip(ranges, by_range, strict=True)
        ],
        "mtp": mtp,
    }


def show_result(evaluation: Evaluation, path: str, console: Console) -> None:
    """Prints lines for sources and task results, and the file's path."""
    plain = evaluation.plain()
    step = "" if evaluation.step is None else f", step {evaluation.step}"
    average = ", average of the weights" if evaluation.weights == "ema" else ""
    rows = [(row, f"{row['documents']}: {row['name']}") for row in plain["sources"]]
    if len(rows) > 1:
        rows.append((plain["total"], "together"))
    lines = [f"\n{evaluation.name}{step}{average}: {evaluation.checkpoint}", _titles(plain["total"]["mtp"])]
    lines += [_line(row, words) for row, words in rows]
    lines += _by_position(plain["total"]["positions"])
    lines += needle_lines(evaluation.needle)
    if evaluation.answers is not None:
        lines += lines_of_answers(evaluation.answers)
    for task, metrics in evaluation.tasks.items():
        lines += [f"{task:>12}  {metric} {value:.4f}" for metric, value in metrics.items()]
    for line in [*lines, f"Written to {path}"]:
        console.print(line, soft_wrap=True, markup=False)


def _titles(mtp: list[dict[str, Any]]) -> str:
    drafts = "".join(f"   MTP {draft['depth']}  {'agrees':>6}" for draft in mtp)
    return f"{'tokens':>12}  {'loss':>8}  {'perplexity':>10}  {'bits/byte':>9}{drafts}  documents"


def _line(row: dict[str, Any], words: str) -> str:
    drafts = "".join(f"  {_text(draft['loss'], 3):>6}  {draft['agreement']:>6.1%}" for draft in row["mtp"])
    numbers = f"{_text(row['loss'], 4):>8}  {_text(row['perplexity'], 2):>10}  {_text(row['bits_per_byte'], 4):>9}"
    return f"{row['tokens']:>12,}  {numbers}{drafts}  {words}"


def _by_position(ranges: list[dict[str, Any]]) -> list[str]:
    """Returns a line with position ranges and a line with their losses. Returns no lines if there is only one range."""
    if len(ranges) <= 1:
        return []
    titles = (f"{each['first']}-{each['last']}" for each in ranges)
    losses = (_text(each["loss"], 4) for each in ranges)
    return [
        f"{name:>12}{''.join(f'{word:>15}' for word in words)}"
        for name, words in (("positions", titles), ("loss", losses))
    ]


def lines_of_answers(judged: JudgedAnswers) -> list[str]:
    """Returns a title line, and one line per scored set of answers."""
    title = f"{'ROUGE-L':>12}  {'loss':>8}  answers to {judged.questions} held-out questions"
    rows = [
        f"{score.rouge_l:>12.4f}  {'' if score.loss is None else _text(score.loss, 4):>8}  {score.of}"
        for score in judged.scores
    ]
    return [title, *rows]


def _which(source: EvaluatedSource) -> str:
    return "held out" if source.own else "all"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _text(value: float | None, digits: int) -> str:
    return "infinite" if value is None else f"{value:.{digits}f}"
