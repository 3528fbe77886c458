"""Loss on held-out sequences, in any layout: what a run validates with, and what mode=evaluate measures."""

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
    """Sums over sequences of all ranks."""

    sequences: int = 0
    tokens: int = 0
    """Targets that are learnt, eos included."""
    text_bytes: int = 0
    """Bytes of text that the targets stand for."""
    nats: float = 0.0
    """-log p of all targets, of the main model."""
    more: tuple[float, ...] = ()
    """Sums of whatever else was measured on the way."""

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
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Not a number where the targets stand for no text."""
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else math.nan


def held_out_loss(
    pipeline: Pipeline,
    data: ValidationData,
    mesh: Mesh,
    size: int,
    device: torch.device,
    more: Callable[[], Tensor] | None = None,
) -> Sums:
    """Main loss on all sequences of `data`, shared out over the data-parallel ranks; every rank gets the same sums.

    size: sequences per forward pass of one rank. more: called on every rank after each pass that counts, gives further
    sums of that pass (float64, the same number of them everywhere; zeros where a rank has nothing to add).
    """
    totals: Tensor | float = 0.0
    for first in range(0, len(data), size * mesh.layout.dp):
        # Every rank makes the same number of passes, since experts are shared; a rank without a share of its own
        # repeats the first sequences and does not count them.
        mine = first + mesh.dp_rank * size
        batch = data.batch(mine if mine < len(data) else 0, size)
        loss = pipeline.evaluate(
            batch.tokens_BS.to(device), batch.documents_BS, supervised_BS=batch.supervised_BS, micro_batches=1
        )
        own = torch.zeros(4, dtype=torch.float64)
        if loss is not None:
            # The ranks that share sequences have a loss each: the mean of as many positions, or the sum of those that are supervised.
            # One of them counts what is the sequences'.
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
