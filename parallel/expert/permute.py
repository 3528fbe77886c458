"""Moves rows between two orders by gathers only.

A FanOut maps every copy to its source row. Its two uses are each other's backward; neither scatters or adds in place:

    spread:  copies_C = sources_S[source_C]                        a gather
    collect: sources_S[s] = sum of copies_C[c] over the copies c of s     a gather with a sum

`collect` accumulates in fp32. Dispatch is a chain of spreads, with exchanges between them. Combine is the reverse
chain, with collects. On a GPU, parallel/expert/triton_dispatch.py computes the same.

Shapes: S sources, C copies, N targets, K entries per source, X any width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class FanOut(NamedTuple):
    """Maps copies of rows to source rows. Copies are ordered by target, such as a rank or an expert, then by source."""

    source_C: Tensor
    """For each copy, the index of its source row, int64."""
    copy_C: Tensor
    """Indices of all copies, int64, ordered by source."""
    start_S: Tensor
    """For each source, the index of its first copy in copy_C."""


def fan_out(hits_SN: Tensor, copies: int) -> FanOut:
    """Return a FanOut with one copy of source s for every target n with hits_SN[s, n]. copies: number of copies."""
    hits_NS = hits_SN.t().contiguous()
    source_C = torch.nonzero_static(hits_NS, size=copies)[:, 1]
    place_NS = hits_NS.flatten().cumsum(0) - 1
    by_source_C2 = torch.nonzero_static(hits_SN, size=copies)
    copy_C = place_NS.index_select(0, by_source_C2[:, 1] * hits_SN.shape[0] + by_source_C2[:, 0])
    lengths_S = hits_SN.sum(1)
    return FanOut(source_C, copy_C, lengths_S.cumsum(0) - lengths_S)


class ExpertTargets(NamedTuple):
    """Targets, such as ranks, with `per_target` consecutive experts each. first: the first target's first expert."""

    first: int
    per_target: int
    targets: int


def fan_out_of(ids_SK: Tensor, wanted: ExpertTargets, copies: int) -> FanOut:
    """Return a FanOut with one copy of source s for every target that holds one of the experts ids_SK[s]."""
    if ids_SK.is_cuda:
        return FanOut(*triton_dispatch().place_hits(ids_SK, *wanted, copies)[:3])
    return fan_out(hits(ids_SK, wanted), copies)


def fan_out_with_entries(ids_SK: Tensor, wanted: ExpertTargets, copies: int) -> tuple[FanOut, Tensor]:
    """Return the FanOut to targets with one expert each, and each copy's index in the flattened ids_SK, int64 (C,)."""
    assert wanted.per_target == 1
    if ids_SK.is_cuda:
        *fan, entry_C = triton_dispatch().place_hits(ids_SK, *wanted, copies)
        return FanOut(*fan), entry_C
    hits_SN = hits(ids_SK, wanted)
    fan = fan_out(hits_SN, copies)
    expert_N = torch.arange(wanted.first, wanted.first + wanted.targets, device=ids_SK.device)
    expert_C = expert_N.repeat_interleave(hits_SN.sum(0), output_size=copies)
    entry_C = (ids_SK.index_select(0, fan.source_C) == expert_C[:, None]).int().argmax(1)
    return fan, fan.source_C * ids_SK.shape[1] + entry_C


def count_hits(ids_SK: Tensor, wanted: ExpertTargets) -> Tensor:
    """Return how many sources have an expert in each target: (N,)."""
    if ids_SK.is_cuda:
        return triton_dispatch().count_hits(ids_SK, *wanted).sum(0)
    return hits(ids_SK, wanted).sum(0)


def hits(ids_SK: Tensor, wanted: ExpertTargets) -> Tensor:
    """Return whether each target holds an expert of each source: (S, N)."""
    first, per_target, targets = wanted
    column_SK = (ids_SK - first).div(per_target, rounding_mode="floor").long()
    column_SK = column_SK.where((column_SK >= 0) & (column_SK < targets), targets)
    hits = torch.zeros(ids_SK.shape[0], targets + 1, dtype=torch.bool, device=ids_SK.device)
    return hits.scatter_(1, column_SK, True)[:, :targets]


def sort_entries(target_SK: Tensor) -> FanOut:
    """Return a FanOut with one copy per element of target_SK, whose values are below 32768."""
    sources, entries = target_SK.shape
    order_C = target_SK.flatten().to(torch.int16).argsort(stable=True)
    copy_C = torch.empty_like(order_C)
    copy_C.scatter_(0, order_C, torch.arange(order_C.numel(), device=order_C.device))
    start_S = torch.arange(sources, device=order_C.device) * entries
    return FanOut(order_C // entries, copy_C, start_S)


def spread(rows_SX: Tensor, fan: FanOut) -> Tensor:
    """Return the copies of the rows, (C, X)."""
    return rows_SX.index_select(0, fan.source_C)


def collect(rows_CX: Tensor, fan: FanOut, out_SX: Tensor | None = None) -> Tensor:
    """Return the sum of every source's copies, (S, X), added in target order and rounded once. out_SX: buffer for the
    result."""
    if not rows_CX.is_cuda:
        sum_SX = F.embedding_bag(fan.copy_C, rows_CX, fan.start_S, mode="sum")
        return sum_SX if out_SX is None else out_SX.copy_(sum_SX)
    if out_SX is None:
        out_SX = rows_CX.new_empty(len(fan.start_S), rows_CX.shape[1])
    triton_dispatch().collect(rows_CX, fan.copy_C, fan.start_S, out_SX)
    return out_SX


def triton_dispatch():
    """Return the module of GPU kernels, typed for the type checker."""
    from parallel.expert import triton_dispatch as kernels

    return kernels
