"""Dispatchers for a rank without peers: the real classes, with an all-to-all that creates the peers' rows.

Such a rank runs alone in a plan (on the meta device) or in a dry run. A `Load` determines how many rows arrive; they
are copies of this rank's rows.

Shapes: T tokens of this rank, K experts per token, P peers, M messages that arrive, R rows, L experts of this rank.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import _disable_current_modes

from parallel.expert.all_to_all import AllToAllDispatcher
from parallel.expert.deep_ep import DeepEPDispatcher
from parallel.expert.dispatcher import ChainDispatcher, DispatchPlan, ExchangeDispatcher
from parallel.expert.link import Link, Traffic, Transfer
from parallel.expert.node_limited import NodeLimitedDispatcher
from parallel.expert.permute import ExpertTargets, FanOut, fan_out_of, sort_entries
from parallel.expert.wire import Wire


@dataclass(frozen=True)
class Group:
    """An expert-parallel group of which only this rank runs."""

    ranks: int
    ranks_per_node: int
    experts: int
    top_k: int
    groups: int
    """Number of expert groups. A token's experts are in top_groups of them."""
    top_groups: int

    def reached(self, units: int) -> float:
        """Return the mean number of nodes (or ranks) that hold at least one of a token's experts.

        units: number of all nodes (or ranks). Each holds equally many consecutive experts.
        """
        experts_per_unit, experts_per_group = self.experts // units, self.experts // self.groups
        open_experts = experts_per_group * self.top_groups
        if experts_per_unit <= experts_per_group:
            chance = self.top_groups / self.groups
            return units * chance * _some(open_experts, experts_per_unit, self.top_k)
        # Number of groups per unit. The router chooses a varying number of them.
        inside = experts_per_unit // experts_per_group
        ways = math.comb(self.groups, self.top_groups)
        return units * sum(
            math.comb(inside, opened)
            * math.comb(self.groups - inside, self.top_groups - opened)
            / ways
            * _some(open_experts, opened * experts_per_group, self.top_k)
            for opened in range(min(inside, self.top_groups) + 1)
        )


def _some(experts: int, here: int, top_k: int) -> float:
    """Return the probability that `top_k` of `experts` experts include one of `here` given experts."""
    return 1 - math.comb(experts - here, top_k) / math.comb(experts, top_k)


@dataclass(frozen=True)
class Load:
    """Number of tokens from all ranks for each expert of this rank in one dispatch."""

    per_token_L: tuple[float, ...]
    """For each expert of this rank: its number of rows / number of tokens of this rank."""

    @classmethod
    def even(cls, group: Group, factor: float = 1.0) -> "Load":
        """Return equal loads for all experts of this rank. factor: this rank's rows / mean rows of all ranks."""
        return cls((group.ranks * group.top_k / group.experts * factor,) * (group.experts // group.ranks))

    def rows_L(self, tokens: int) -> list[int]:
        """Return the number of rows of each expert. The numbers are integers, and their sum is the rounded total."""
        ends = [round(tokens * end) for end in itertools.accumulate(self.per_token_L)]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def split_evenly(total: int, parts: int) -> list[int]:
    """Return integers that sum to total and differ by at most 1."""
    return [total * (i + 1) // parts - total * i // parts for i in range(parts)]


class StandInLink(Link):
    """A link without peers, which receives rows that it sends."""

    def __init__(self, nodes_P: Sequence[int]):
        self.group: ProcessGroup | None = None
        self.size, self.rank = len(nodes_P), 0
        self._across_P = [node != nodes_P[0] for node in nodes_P]

    def start(self, rows_CX: Tensor, sent_P: Sequence[int], received_P: Sequence[int], traffic: Traffic) -> Transfer:
        rows_CX = rows_CX.contiguous()
        rows_RX = rows_CX.new_empty(sum(received_P), rows_CX.shape[1])
        for first in range(0, len(rows_RX) if len(rows_CX) else 0, len(rows_CX)):
            part = rows_RX[first : first + len(rows_CX)]
            part.copy_(rows_CX[: len(part)])
        self._count(rows_CX.shape[1] * rows_CX.element_size(), sent_P, traffic)
        return Transfer(rows_CX, rows_RX, None, traffic)


class FlatStandIn(AllToAllDispatcher):
    """`AllToAllDispatcher` of a rank that runs alone."""

    def __init__(self, group: Group, wire: Wire, load: Load):
        link: Link = StandInLink([rank // group.ranks_per_node for rank in range(group.ranks)])
        ChainDispatcher.__init__(self, [link], wire)
        self.experts, self.load = group.experts, load

    def _plan(self, expert_ids_TK: Tensor) -> DispatchPlan:
        ranks, rows_L = self.links[0].size, self.load.rows_L(len(expert_ids_TK))
        device = expert_ids_TK.device
        sent = split_evenly(expert_ids_TK.numel(), ranks)
        arriving_PL = torch.tensor([split_evenly(rows, ranks) for rows in rows_L]).t()
        expert_R = torch.arange(len(rows_L)).repeat(ranks).repeat_interleave(arriving_PL.flatten()).to(device)
        counts_E = torch.tensor(rows_L, device=device)
        fans = [sort_entries(expert_ids_TK), sort_entries(expert_R[:, None])]
        return DispatchPlan([sent], [arriving_PL.sum(1).tolist()], sum(rows_L), counts_E, expert_ids_TK, fans)


class NodeLimitedStandIn(NodeLimitedDispatcher):
    """`NodeLimitedDispatcher` of a rank that runs alone."""

    def __init__(self, group: Group, wire: Wire, load: Load):
        nodes = group.ranks // group.ranks_per_node
        self.inter: Link = StandInLink(range(nodes))
        self.intra: Link = StandInLink([0] * group.ranks_per_node)
        links: list[Link] = [link for link in (self.inter, self.intra) if link.size > 1] or [self.intra]
        ChainDispatcher.__init__(self, links, wire)
        self.experts, self.load = group.experts, load
        self.per_rank, self.per_node = group.experts // group.ranks, group.experts // nodes
        reached: dict[Link, float] = {self.inter: group.reached(nodes), self.intra: group.reached(group.ranks)}
        self._per_token = [reached[link] for link in links]

    def _plan(self, expert_ids_TK: Tensor) -> DispatchPlan:
        tokens, device = len(expert_ids_TK), expert_ids_TK.device
        totals = [max(1, round(tokens * per_token)) for per_token in self._per_token]
        sent = [split_evenly(total, link.size) for total, link in zip(totals, self.links, strict=True)]
        # In each hop, as many messages arrive as the rank sends. In the last hop, more arrive if `load` exceeds the
        # mean.
        rows_L = self.load.rows_L(tokens)
        arriving = max(1, round(totals[-1] * sum(rows_L) / expert_ids_TK.numel()), *rows_L)
        received = [*sent[:-1], split_evenly(arriving, self.links[-1].size)]
        counts_E = torch.tensor(rows_L, device=device)
        return DispatchPlan(sent, received, sum(rows_L), counts_E, expert_ids_TK, [_fan(sent[0], tokens, device)])

    def _learn(self, plan: DispatchPlan, side_MX: Tensor) -> None:
        messages = len(side_MX)
        if len(plan.fans) < len(self.links):
            plan.fans.append(_fan(plan.sent[1], messages, side_MX.device))
            return
        rows = _fan(self.load.rows_L(len(plan.ids_TK)), messages, side_MX.device)
        plan.fans.append(rows)
        plan.entry_of_row = rows.source_C * plan.ids_TK.shape[1]


def _fan(copies_N: Sequence[int], sources: int, device: torch.device) -> FanOut:
    """Build a FanOut that assigns the sources to the targets in turn. copies_N: copies per target."""
    targets = len(copies_N)
    return fan_out_of(_ids(tuple(copies_N), sources, device), ExpertTargets(0, 1, targets), sum(copies_N))


@cache
def _ids(copies_N: tuple[int, ...], sources: int, device: torch.device) -> Tensor:
    """Return (S, N): for each source, the targets of its copies, then -1.

    Built outside torch's dispatch modes, so that a count of memory does not include this tensor.
    """
    with _disable_current_modes():
        ids_SN = torch.full((sources, len(copies_N)), -1, dtype=torch.int16, device=device)
        first = 0
        for target, copies in enumerate(copies_N):
            assert copies <= sources, f"{copies} copies of {sources} different messages"
            ids_SN[first : first + copies, target] = target
            ids_SN[: max(0, first + copies - sources), target] = target
            first = (first + copies) % sources
    return ids_SN


class DeepEPStandIn(DeepEPDispatcher):
    """`DeepEPDispatcher` of a rank that runs alone, with `_Buffer` for DeepEP's buffer."""

    def __init__(self, group: Group, wire: Wire, load: Load):
        ExchangeDispatcher.__init__(self, wire)
        self._deep_ep = SimpleNamespace(topk_idx_t=torch.int64)
        self.experts, self.local = group.experts, group.experts // group.ranks
        self.buffer = _Buffer(load, group.reached(group.ranks), group.top_k)


class _Buffer:
    """Behaves as the documentation of `deep_ep.Buffer` promises. Received rows are copies of sent rows."""

    def __init__(self, load: Load, per_token: float, top_k: int):
        self._load, self._per_token, self._top_k = load, per_token, top_k

    def get_dispatch_layout(self, ids_TK: Tensor, experts: int):
        return None, None, None, None, None

    def dispatch(self, x, handle=None, topk_idx: Tensor | None = None, topk_weights: Tensor | None = None, **layout):
        parts = x if isinstance(x, tuple) else (x,)
        tokens = handle or len(parts[0])
        rows_L = self._load.rows_L(tokens)
        messages = max(1, round(self._per_token * sum(rows_L) / self._top_k), *rows_L)
        received = tuple(_cycle(part, messages) for part in parts)
        received = received if isinstance(x, tuple) else received[0]
        if handle is not None:
            return received, None, None, None, None, None
        assert topk_idx is not None and topk_weights is not None
        entries, counts = topk_idx.shape[1], rows_L
        ids_MK = topk_idx.new_full((messages, entries), -1)
        first = 0
        for expert, rows in enumerate(() if ids_MK.is_meta else counts):
            assert rows <= messages, f"{rows} rows of {messages} messages"
            column = expert % entries
            ids_MK[first : first + rows, column] = expert
            ids_MK[: max(0, first + rows - messages), column] = expert
            first = (first + rows) % messages
        return received, ids_MK, _cycle(topk_weights, messages), counts, tokens, None

    def combine(self, x_MD: Tensor, handle: int, topk_weights: Tensor | None = None):
        """Return one row for each token of this rank, copied from x_MD. handle: number of these tokens."""
        return _cycle(x_MD, handle), None if topk_weights is None else _cycle(topk_weights, handle), None


def _cycle(x_SX: Tensor, rows: int) -> Tensor:
    """Return `rows` rows of x, which repeat if necessary."""
    out_RX = x_SX.new_empty(rows, *x_SX.shape[1:])
    for first in range(0, rows, max(1, len(x_SX))):
        part = out_RX[first : first + len(x_SX)]
        part.copy_(x_SX[: len(part)])
    return out_RX
