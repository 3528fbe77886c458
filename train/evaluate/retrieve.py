"""Runs a model, in any layout, on the texts of the needle test (train/evaluate/needle.py).

Every text is one sequence without document borders. Of the main model's states only those at the key's tokens are turned into logits,
on whichever rank has them.

Shapes: B texts, S = T + 1 tokens, N tokens of keys.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema import Config
from parallel.mesh import Mesh
from parallel.pipeline.schedule import Pipeline
from train.data.corpus import Corpus, CorpusPart
from train.data.dataset import ValidationData
from train.data.tokenizer import Tokenizer
from train.evaluate.needle import NEEDLE_DEPTHS, NEEDLE_TEXTS, NeedleCell, make_needles
from train.evaluate.observed import here, read
from train.model.deepseek import DeepSeekV3
from train.model.sequence import Positions


def read_fillers(config: Config, corpus: Corpus, part: CorpusPart) -> list[list[int]]:
    """Tokens of held-out text, one list for each text of a cell, as long as the longest text; line ends instead of ends of
    documents.
    """
    longest, count = max(config.evaluate.needle), NEEDLE_TEXTS
    data = ValidationData(replace(corpus, parts=[part]), replace(config, seq_len=longest), count)
    tokens_BS, newline = data.batch(0, len(data)).tokens_BS, corpus.tokenizer.encode("\n")[-1]
    fillers = tokens_BS.masked_fill(tokens_BS == corpus.tokenizer.eos_id, newline).tolist()
    return [fillers[number % len(fillers)] for number in range(count)]


def search_needles(
    config: Config,
    pipeline: Pipeline[DeepSeekV3],
    mesh: Mesh,
    device: torch.device,
    tokenizer: Tokenizer,
    fillers: list[list[int]],
    start_id: int,
) -> list[NeedleCell]:
    """A cell for each length and depth; the same on every rank. Collective. start_id: token in front of every text."""
    needles = make_needles(config, tokenizer)
    keys = [len(needle.key) for needle in needles]
    watch = _Watch(pipeline.modules[-1] if pipeline.has_last else None)
    cells = []
    for length, depth in product(config.evaluate.needle, NEEDLE_DEPTHS):
        pairs = zip(needles, fillers, strict=True)
        tokens_BS = torch.tensor([needle.text(start_id, filler, length, depth) for needle, filler in pairs])
        found, nats = _score(pipeline, mesh, device, watch, tokens_BS, keys, config.micro_batch_size)
        cells.append(NeedleCell(length, depth, len(keys), found, nats))
    return cells


def _score(
    pipeline: Pipeline[DeepSeekV3],
    mesh: Mesh,
    device: torch.device,
    watch: "_Watch",
    tokens_BS: Tensor,
    keys: list[int],
    size: int,
) -> tuple[int, float]:
    """Keys that are found, and nats of a key; texts are shared out over the data-parallel ranks."""
    sums_B2 = torch.zeros(len(keys), 2, dtype=torch.float64)
    for first in range(0, len(keys), size * mesh.layout.dp):
        # Every rank makes the same number of passes, since experts are shared; one without a text of its own repeats the first.
        mine = first + mesh.dp_rank * size
        rows = slice(mine, mine + size) if mine < len(keys) else slice(0, size)
        part_B2 = watch.over(
            keys[rows], lambda rows=rows: pipeline.evaluate(tokens_BS[rows].to(device), micro_batches=1)
        )
        if mine < len(keys):
            sums_B2[rows] += part_B2
    sums_B2 = sums_B2.to(device)
    dist.all_reduce(sums_B2)
    nats_B, missed_B = sums_B2.cpu().unbind(1)
    return int((missed_B == 0).sum()), nats_B.mean().item()


class _Watch:
    """Reads keys from the last chunk of a model, wherever it is."""

    def __init__(self, last: DeepSeekV3 | None):
        self._keys: list[int] = []
        if last is not None:
            last.observer = partial(self._observe, last)

    def over(self, keys: list[int], forward: Callable[[], object]) -> Tensor:
        """Nats of each key, and how many of its tokens another one is likelier than, of the part that is here: (B, 2).

        keys: tokens of each text's key. forward: runs the texts through the model.
        """
        self._keys, self._sums_B2 = keys, torch.zeros(len(keys), 2, dtype=torch.float64)
        forward()
        return self._sums_B2

    @torch.no_grad()
    def _observe(self, last: DeepSeekV3, states: list[Tensor], tokens_BS: Tensor, positions: Positions) -> None:
        place_T = here(positions, tokens_BS.device)
        keys_B1 = torch.tensor(self._keys, device=tokens_BS.device).unsqueeze(1)
        text_N, at_N = (place_T >= positions.length - keys_B1).nonzero(as_tuple=True)
        if not len(text_N):
            return
        targets_N = positions.take(tokens_BS, 1)[text_N, at_N]
        named_N, nats_N = read(last, states[0][text_N, at_N], targets_N)
        sums_N2 = torch.stack([nats_N.double(), (named_N != targets_N).double()], 1).cpu()
        self._sums_B2.index_add_(0, text_N.cpu(), sums_N2)
