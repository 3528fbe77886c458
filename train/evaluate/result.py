"""Writes evaluate.json and prints its table.

    name, checkpoint, step          the run, the folder of the weights, their optimizer steps (null: Hugging Face)
    weights                         master, or ema (their moving average)
    precision, seq_len              as evaluated
    total                           all sources together, see below
    sources                         one object per source: name, documents (held out, or all), and the keys of total
    needle                          one object per length and depth: length, depth, texts, found (texts whose key the model names),
                                    nats (mean per key; 11.5 for guessing), see needle.py
    answers                         null, or scores of answers to held-out questions (answers.py): questions, scores
                                    (of, rouge_l, loss) and examples
    tasks                           task -> metric -> number, as lm-evaluation-harness names them

Keys of total and of each source:

    sequences, tokens, text_bytes   the text read: sequences of seq_len, targets, bytes of text that the targets decode to
    loss                            nats per token of the main model, as validation_loss in metrics.jsonl
    perplexity                      e to the loss
    bits_per_byte                   comparable between tokenizers; null if the targets are no text
    positions                       one object per range of positions, none for chats: first, last (counted from 1: position i sees
                                    i tokens and predicts the next), loss
    mtp                             one object per depth, none for chats: depth, loss (as mtp_loss in metrics.jsonl), and agreement,
                                    the share of positions where it names the same token as the main model

If the run has trained on a source, only the held-out documents count; otherwise all documents count. The run has
trained on a source if the checkpoint records its path or its content hash. So a moved folder does not count as new, and
a folder with additional documents does not either. A checkpoint also records the held-out fraction.
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

# Measures, during the forward pass of the loss, the loss by position and the predictions of the MTP modules.
#
# Position i (counted from 1) sees i tokens and predicts the next. If a model uses long text, its loss is lower at late
# positions than at early positions. If its usable context is shorter than the text, its loss rises at late positions.
# Ranges of positions end at seq_len, half of seq_len, a quarter and so on. So two evaluations whose lengths are powers
# of two have the same borders.
#
# MTP depth k at position i and the main model at position i + k predict the same token, i + k + 1. In greedy
# speculative decoding the main model accepts a draft token exactly if it predicts this token too. So the agreement on
# given text estimates the acceptance rate of depth k (paper 5.4.3: 85 to 90 % for the second token).
#
# Shapes: B sequences, S = T + 1 tokens, T positions (those on this rank if sequences are shared), D width, V vocabulary,
# N positions in a row.

RANGES = 6
"""Maximum number of ranges of positions."""
SHORTEST = 32
"""Minimum number of positions in a range, if there are several ranges. The loss of a smaller range would be noise."""


def position_ranges(seq_len: int) -> list[range]:
    """Returns ranges that cover all positions, counted from 0. The last range is the last half, the range before it is
    the quarter before this half, and so on; the first range has the remaining positions."""
    ends = [seq_len >> halvings for halvings in reversed(range(RANGES))]
    return [range(*ends) for ends in pairwise([0, *(end for end in ends if end >= SHORTEST or end == seq_len)])]


class ObservedChunk:
    """Measures losses and predictions on the last chunk of a model. `take` returns the sums of the latest forward
    pass."""

    def __init__(self, depths: int, seq_len: int, last: DeepSeekV3 | None):
        """last: the chunk with the head; None on a rank without it."""
        self._ends = torch.tensor([positions.stop for positions in position_ranges(seq_len)])
        self._sums = torch.zeros(len(self._ends) + 2 * depths, dtype=torch.float64)
        if last is not None:
            last.observer = partial(self._observe, last)

    def take(self) -> Tensor:
        """Sums of the latest forward pass.

        For each range of positions: the nats of its targets. For each MTP depth: the nats of its targets, and the
        number of positions where it agrees with the main model.
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
    """Numbers (T,) of this rank's positions, from 0."""
    return torch.cat([torch.arange(piece.start, piece.stop, device=device) for piece in positions.here])


def read(last: DeepSeekV3, hidden_BTD: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the likeliest token at each position, and -log p of the target in nats, fp32. Any shapes (..., D) and
    (...).

    The logits are computed for model.loss_chunk positions at a time.
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
    """Values at all positions, gathered from the ranks that share the sequences."""
    if positions.share is None:
        return own_BT
    rows = [len(piece) for piece in positions.pieces]
    return torch.cat(positions.share.gather_begin(own_BT.unsqueeze(-1), rows).wait(), 1).squeeze(-1)


ALL = 1 << 62
"""A number that is larger than the number of sequences of any source."""


@dataclass(frozen=True)
class EvaluatedSource:
    """One source and its sequences."""

    name: str
    own: bool
    """Whether the run has trained on the source. If so, only the held-out documents count."""
    part: CorpusPart
    """The corpus part; the evaluation reads its validation documents."""
    data: ValidationData


def choose_sources(corpus: Corpus, config: Config, held_out: dict[str, Any] | None) -> list[EvaluatedSource]:
    """Returns the sources that get evaluated sequences, in the order of the mix. held_out: the checkpoint's record of
    the run's data."""
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
    """Raise UserError if the rule for held-out documents has changed. With another rule, the run would be evaluated on
    documents that it has trained on."""
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
        """The object of evaluate.json."""
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
    """Computes rates from sums. `more` of the sums has the layout of `ObservedChunk.take`."""
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
    """Prints a line per source, a line per task result, and the file's path."""
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
    """Two lines about the loss by position, if there are several ranges."""
    if len(ranges) <= 1:
        return []
    titles = (f"{each['first']}-{each['last']}" for each in ranges)
    losses = (_text(each["loss"], 4) for each in ranges)
    return [
        f"{name:>12}{''.join(f'{word:>15}' for word in words)}"
        for name, words in (("positions", titles), ("loss", losses))
    ]


def lines_of_answers(judged: JudgedAnswers) -> list[str]:
    """Returns a title and a line for each set of scored answers."""
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
