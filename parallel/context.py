"""Context parallelism: the ranks of a group share each sequence and exchange the latents that attention needs.

A sequence is cut into 2 N pieces; rank r of N works on pieces r and 2 N - 1 - r (train/model/sequence.py). Before
attention, the ranks gather MLA's latents and rope keys. The backward gathers them again. The latents' gradients return
by an all-to-all in the activation dtype; the receiver sums them in fp32.

The ranks of a group run the same actions of the same stage. Each call waits for its own collective.

Shapes: B sequences, T positions of this rank, L positions of a piece, X any width, N ranks.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from parallel.expert.link import TrafficCounters


class ContextParallel:
    """Exchanges data with the ranks that share this rank's sequences. Implements `SequenceShare`.

    across: whether the group spans several nodes.
    """

    def __init__(self, group: dist.ProcessGroup, across: bool = False):
        self.group, self._across = group, across
        self.parts, self.part = dist.get_world_size(group), dist.get_rank(group)
        self.counters = TrafficCounters()
        """Bytes sent. Gathers count as forward traffic, `scatter_sum` as backward traffic."""

    def gather_begin(self, own_BTX: Tensor, rows: Sequence[int]) -> "LatentsOnTheirWay":
        """Start to gather all pieces; `wait` of the result returns them.

        own_BTX: this rank's two pieces. rows: positions of each piece.
        """
        size = max(rows)
        own_BTX = F.pad(own_BTX, (0, 0, 0, 2 * size - own_BTX.size(1))).contiguous()
        all_NBTX = own_BTX.new_empty(self.parts, *own_BTX.shape)
        work = self._all_gather(all_NBTX, own_BTX)
        self._count(own_BTX, self.parts - 1, gather=True)
        return LatentsOnTheirWay(own_BTX, all_NBTX, work, rows)

    def scatter_sum(self, pieces: list[Tensor]) -> Tensor:
        """Return the sums over all ranks for this rank's positions: (B, T, X).

        pieces: this rank's values, one tensor per piece of the sequence.
        """
        size = max(piece.size(1) for piece in pieces)
        own = pieces[self.part].size(1) + pieces[-1 - self.part].size(1)
        padded = [F.pad(piece, (0, 0, 0, size - piece.size(1))) for piece in pieces]
        sent_NBTX = torch.stack([torch.cat([padded[r], padded[-1 - r]], 1) for r in range(self.parts)])
        arrived_NBTX = torch.empty_like(sent_NBTX)
        self._all_to_all(arrived_NBTX, sent_NBTX)
        self._count(sent_NBTX[0], self.parts - 1, gather=False)
        return arrived_NBTX.sum(0, dtype=torch.float32).to(sent_NBTX.dtype)[:, :own]

    def total(self, counts: Tensor) -> Tensor:
        """Return the sum of `counts` over all ranks, on every rank."""
        counts = counts.clone()
        dist.all_reduce(counts, group=self.group)
        return counts

    def _all_gather(self, all_NBTX: Tensor, own_BTX: Tensor) -> dist.Work | None:
        return dist.all_gather_into_tensor(all_NBTX.flatten(0, 1), own_BTX, group=self.group, async_op=True)

    def _all_to_all(self, arrived_NBTX: Tensor, sent_NBTX: Tensor) -> None:
        dist.all_to_all_single(arrived_NBTX, sent_NBTX, group=self.group)

    def _count(self, part: Tensor, times: int, gather: bool) -> None:
        traffic = self.counters.forward if gather else self.counters.backward
        sent = part.numel() * part.element_size() * times
        if self._across:
            traffic.across_bytes += sent
        else:
            traffic.inside_bytes += sent


class LoneContext(ContextParallel):
    """Context parallelism of a rank that runs alone. Other ranks' values are copies of its own."""

    def __init__(self, ranks: int, rank: int = 0):
        self.parts, self.part, self.counters, self._across = ranks, rank, TrafficCounters(), False

    def total(self, counts: Tensor) -> Tensor:
        return counts * self.parts

    def _all_gather(self, all_NBTX: Tensor, own_BTX: Tensor) -> None:
        all_NBTX.copy_(own_BTX.expand_as(all_NBTX))

    def _all_to_all(self, arrived_NBTX: Tensor, sent_NBTX: Tensor) -> None:
        arrived_NBTX.copy_(sent_NBTX)


class LatentsOnTheirWay:
    """A gather in progress. The object keeps the send buffer alive."""

    def __init__(self, own_BTX: Tensor, all_NBTX: Tensor, work: dist.Work | None, rows: Sequence[int]):
        self._own_BTX, self._all_NBTX, self._work, self._rows = own_BTX, all_NBTX, work, rows

    def wait(self) -> list[Tensor]:
        """Return all pieces in order, each (B, rows[j], X), as views of the receive buffer. Call once."""
        if self._work is not None:
            self._work.wait()
        size = self._all_NBTX.size(2) // 2
        early, late = (list(half) for half in self._all_NBTX.split(size, 2)) if size else ([], [])
        pieces = [*early, *late[::-1]]
        return [piece[:, :rows] for piece, rows in zip(pieces, self._rows, strict=True)]
