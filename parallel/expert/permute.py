"""Moving rows between two orders by gathers alone.

A FanOut says which source row every copy holds. Its two uses are each other's transpose, so each is the
other's backward pass, and neither scatters or adds in place:

    spread:  copies_C = sources_S[source_C]                        a gather
    collect: sources_S[s] = sum of copies_C[c] over c in the list of s    a gather with a sum

`collect` reads the copies once and keeps the sum in fp32 (embedding_bag does both), where a gather followed by
a sum would first write all copies again. Dispatch is a chain of spreads with an exchange between two of them,
combine the same chain backwards with collects.

Shapes: S sources, C copies, N targets, K entries per source, X any width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class FanOut(NamedTuple):
    """Which copies are made of which sources. Copies are ordered by target, then by source."""

    source_C: Tensor
    """Source of every copy, int64."""
    copy_C: Tensor
    """The copies again, listed source by source, int64."""
    start_S: Tensor
    """Where the list of each source starts in copy_C, int64."""


def fan_out(hits_SN: Tensor, copies: int) -> FanOut:
    """One copy of source s for every target n with hits_SN[s, n].

    copies is the number of hits, known to the host: passed in so that a GPU is not asked for it again.
    """
    hits_NS = hits_SN.t().contiguous()
    source_C = torch.nonzero_static(hits_NS, size=copies)[:, 1]
    place_NS = hits_NS.flatten().cumsum(0) - 1
    by_source_C2 = torch.nonzero_static(hits_SN, size=copies)
    copy_C = place_NS.index_select(0, by_source_C2[:, 1] * hits_SN.shape[0] + by_source_C2[:, 0])
    lengths_S = hits_SN.sum(1)
    return FanOut(source_C, copy_C, lengths_S.cumsum(0) - lengths_S)


def sort_entries(target_SK: Tensor) -> FanOut:
    """One copy for every entry of target_SK (values below 32768), so a source may go K times to one target."""
    sources, entries = target_SK.shape
    order_C = target_SK.flatten().to(torch.int16).argsort(stable=True)
    copy_C = torch.empty_like(order_C)
    copy_C.scatter_(0, order_C, torch.arange(order_C.numel(), device=order_C.device))
    start_S = torch.arange(sources, device=order_C.device) * entries
    return FanOut(order_C // entries, copy_C, start_S)


def spread(rows_SX: Tensor, fan: FanOut) -> Tensor:
    """Copies of rows, (C, X)."""
    return rows_SX.index_select(0, fan.source_C)


def collect(rows_CX: Tensor, fan: FanOut) -> Tensor:
    """Sum of every source's copies, (S, X), added in the order of their targets and rounded once."""
    return F.embedding_bag(fan.copy_C, rows_CX, fan.start_S, mode="sum")
