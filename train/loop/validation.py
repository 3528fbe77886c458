"""Computes the loss on held-out sequences, in any layout."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.comm_ring import got_on
from parallel.mesh import Mesh
from parallel.pipeline.schedule import Pipeline
from train.data.dataset import ValidationData


@dataclass(frozen=True)
class Sums:
    """Sizes of the text, and sums of losses, over all ranks."""

    sequences: int = 0
    tokens: int = 0
    """Number of tokens whose prediction is measured, including eos."""
    text_bytes: int = 0
    """Number of bytes of text in the target tokens."""
    nats: float = 0.0
    """Sum of -log p over all target tokens, without MTP."""
    more: tuple[float, ...] = ()
    """Sums of the values that the argument `more` of `held_out_loss` returns."""

    def __add__(self, other: "Sums") -> "Sums":
        more = tuple(a + b for a, b in zip(self.more, other.more, strict=True)) if self.more else other.more
        return Sums(
            self.sequences + other.sequences,
            self.tokens + other.tokens,
            self.text_bytes + other.text_bytes,
            self.nats + other.nats,
            more,
        )

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Mean loss in bits per byte of text; NaN without text."""
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else math.nan


def held_out_loss(
    pipeline: Pipeline,
    data: ValidationData,
    mesh: Mesh,
    size: int,
    device: torch.device,
    more: Callable[[], Tensor] | None = None,
) -> Sums:
    """Computes the main loss on all sequences of `data`. Every rank gets the same sums.

    size: sequences per forward pass of one rank. more: called after each pass; returns further sums, a float64 tensor
    of the same length on all ranks.
    """
    totals: Tensor | float = 0.0
    for first in range(0, len(data), size * mesh.layout.dp):
        # All ranks run the same passes, because their experts serve each other's tokens.
        mine = first + mesh.dp_rank * size
        batch = data.batch(mine if mine < len(data) else 0, size)
        loss = pipeline.evaluate(
            batch.tokens_BS.to(device), batch.documents_BS, supervised_BS=batch.supervised_BS, micro_batches=1
        )
        own = torch.zeros(4, dtype=torch.float64)
        if loss is not None:
            # Ranks that share a sequence have separate losses: means over equal parts, or sums over supervised
            # positions. Only the first of these ranks counts tokens and bytes.
            counts, nats = mesh.cp_rank == 0, loss.item()
            if batch.supervised_BS is None:
                nats *= batch.targets // mesh.layout.cp
            sums = [len(batch.tokens_BS) * counts, batch.targets * counts, data.text_bytes(batch) * counts, nats]
            own = torch.tensor(sums, dtype=torch.float64)
        own = own if more is None else torch.cat([own, more().cpu()])
        totals = totals + own * (mine < len(data))
        got_on()
    assert isinstance(totals, Tensor), "there is always a held-out sequence"
    totals = totals.to(device)
    dist.all_reduce(totals)
    sequences, tokens, text_bytes, nats, *rest = totals.tolist()
    return Sums(int(sequences), int(tokens), int(text_bytes), nats, tuple(rest))
