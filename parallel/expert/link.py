"""Wraps a process group for dispatchers: an asynchronous all-to-all with variable sizes.

Shapes: P peers, C rows sent, R rows received, X any width.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

# Counts the bytes of messages to other ranks, and the time that the host waited for received rows.


@dataclass
class Traffic:
    """Traffic of all transfers since the last `take`."""

    inside_bytes: int = 0
    """Bytes sent to other ranks of the same node."""
    across_bytes: int = 0
    """Bytes sent to ranks of other nodes."""
    waited: float = 0.0
    """Seconds that the host waited for received rows; 0 with NCCL."""


@dataclass
class TrafficCounters:
    """Traffic of the forward and of the backward pass."""

    forward: Traffic = field(default_factory=Traffic)
    backward: Traffic = field(default_factory=Traffic)

    def take(self) -> "TrafficCounters":
        """Return the sums so far, and set the counters to 0."""
        taken = TrafficCounters(self.forward, self.backward)
        self.forward, self.backward = Traffic(), Traffic()
        return taken


class Transfer:
    """An all-to-all in progress, which keeps its buffers alive."""

    def __init__(self, sent: Tensor, received: Tensor, work: dist.Work | None, traffic: Traffic):
        self._held, self._received, self._work, self._traffic = [sent], received, work, traffic

    def holding(self, buffer: Tensor) -> "Transfer":
        """Keep `buffer`, which an earlier transfer still uses, until `wait` returns."""
        self._held.append(buffer)
        return self

    def wait(self) -> Tensor:
        """Wait for the received rows, ordered by peer. Call once."""
        if self._work is not None:
            start = time.perf_counter()
            self._work.wait()
            self._traffic.waited += time.perf_counter() - start
        received = self._received
        del self._held, self._received, self._work
        return received


class Link:
    """All-to-all inside one group.

    group: None for a rank that runs alone. nodes_P: node of every rank of the group, for the counters.
    """

    def __init__(self, group: dist.ProcessGroup | None, nodes_P: Sequence[int]):
        self.group = group
        self.size = len(nodes_P)
        self.rank = 0 if group is None else dist.get_rank(group)
        assert group is None or dist.get_world_size(group) == self.size
        self._across_P = [node != nodes_P[self.rank] for node in nodes_P]

    def start(self, rows_CX: Tensor, sent_P: Sequence[int], received_P: Sequence[int], traffic: Traffic) -> Transfer:
        """Start to send sent_P[p] rows to peer p and receive received_P[p] rows, ordered by peer."""
        assert rows_CX.shape[0] == sum(sent_P)
        if self.size == 1:
            return Transfer(rows_CX, rows_CX, None, traffic)
        rows_CX = rows_CX.contiguous()
        rows_RX = rows_CX.new_empty(sum(received_P), rows_CX.shape[1])
        work = dist.all_to_all_single(rows_RX, rows_CX, list(received_P), list(sent_P), group=self.group, async_op=True)
        self._count(rows_CX.shape[1] * rows_CX.element_size(), sent_P, traffic)
        return Transfer(rows_CX, rows_RX, work, traffic)

    def start_counts(self, counts_PX: Tensor, traffic: Traffic) -> Transfer:
        """Start to send row p of `counts_PX` to peer p."""
        return self.start(counts_PX, [1] * self.size, [1] * self.size, traffic)

    def _count(self, row_bytes: int, sent_P: Sequence[int], traffic: Traffic) -> None:
        for peer, (across, rows) in enumerate(zip(self._across_P, sent_P, strict=True)):
            if across:
                traffic.across_bytes += rows * row_bytes
            elif peer != self.rank:
                traffic.inside_bytes += rows * row_bytes
