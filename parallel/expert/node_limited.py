"""Node-limited dispatch: a token crosses the network between nodes once for each target node (paper 3.2.2).

The router limits the experts of a token to M nodes, so a token costs at most M messages between nodes.

    1. Across nodes: send the token to each node with one of its experts, to the rank at the same position there.
    2. Inside the node: that rank forwards the encoded token to each rank with one of its experts.
    3. On the expert's rank: make one row of the token for each of its experts there.

Combine adds a token's outputs on the expert's rank, then on the forwarding rank, last on the token's rank. Each of
these ranks rounds to the activation dtype; flat dispatch rounds once.

A message is an encoded row, the token's K gates and its K expert ids (int16).

Shapes besides those of dispatcher.py: N nodes, L ranks per node, F experts per rank, E = N*L*F.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from parallel.expert.dispatcher import ChainDispatcher, DispatchPlan, from_words
from parallel.expert.link import Link
from parallel.expert.permute import ExpertTargets, collect, count_hits, fan_out_of, fan_out_with_entries, spread
from parallel.expert.wire import Wire


class NodeLimitedDispatcher(ChainDispatcher):
    """Dispatcher over N nodes of L ranks; rank l of node n holds experts [(n*L + l)*F, (n*L + l + 1)*F).

    inter_group: ranks that have the same position on their nodes as this rank, in node order; None with one node
    intra_group: ranks of this node; None with one rank per node
    experts: E, below 32768
    """

    def __init__(
        self,
        inter_group: dist.ProcessGroup | None,
        intra_group: dist.ProcessGroup | None,
        experts: int,
        wire: Wire,
    ):
        nodes = 1 if inter_group is None else dist.get_world_size(inter_group)
        ranks_per_node = 1 if intra_group is None else dist.get_world_size(intra_group)
        self.inter = Link(inter_group, range(nodes))
        self.intra = Link(intra_group, [0] * ranks_per_node)
        super().__init__([link for link in (self.inter, self.intra) if link.size > 1] or [self.intra], wire)
        self.experts = experts
        self.per_rank = experts // (nodes * ranks_per_node)
        self.per_node = self.per_rank * ranks_per_node

    def _plan(self, expert_ids_TK: Tensor) -> DispatchPlan:
        nodes, ranks = self.inter.size, self.intra.size
        to_node, to_rank = ExpertTargets(0, self.per_node, nodes), ExpertTargets(0, self.per_rank, nodes * ranks)
        wanted = to_node, to_rank, ExpertTargets(0, 1, self.experts)
        outer_NX = torch.cat([count_hits(expert_ids_TK, each).view(nodes, -1) for each in wanted], 1)
        counts, counts_F = self._exchange_counts(outer_NX)
        hops = [hop for hop, link in enumerate((self.inter, self.intra)) if link in self.links]
        sent, received = [counts[2 * hop] for hop in hops], [counts[2 * hop + 1] for hop in hops]
        fans = [fan_out_of(expert_ids_TK, to_node if nodes > 1 else to_rank, sum(sent[0]))]
        return DispatchPlan(sent, received, counts[4][0], counts_F, expert_ids_TK, fans)

    def _exchange_counts(self, outer_NX: Tensor) -> tuple[list[list[int]], Tensor]:
        """Exchange the counts of both hops.

        outer_NX: one row per node: the number of this rank's tokens for the node, then for each of its ranks, then for
        each of its experts. Returns:

        - on the host, per hop: messages to and from each peer, and rows
        - on the device: rows per local expert
        """
        ranks = self.intra.size
        arriving_NX = self.inter.start_counts(outer_NX, self.counters.forward).wait()
        totals_X = arriving_NX.sum(0)
        inner_LX = torch.cat([totals_X[1 : 1 + ranks, None], totals_X[1 + ranks :].view(ranks, -1)], 1)
        at_expert_LX = self.intra.start_counts(inner_LX, self.counters.forward).wait()
        counts_F = at_expert_LX[:, 1:].sum(0)
        parts = [outer_NX[:, 0], arriving_NX[:, 0], inner_LX[:, 0], at_expert_LX[:, 0], counts_F.sum()[None]]
        host = torch.cat(parts).cpu()
        return [part.tolist() for part in host.split([part.numel() for part in parts])], counts_F

    def _first_copies(self, plan: DispatchPlan, words_TW: Tensor, gates_TK: Tensor) -> Tensor:
        ids_TK = plan.ids_TK.to(torch.int16)
        ids_TI = F.pad(ids_TK, (0, ids_TK.shape[1] % 2)).view(torch.int32)
        return spread(torch.cat([words_TW, gates_TK.view(torch.int32), ids_TI], 1), plan.fans[0])

    def _learn(self, plan: DispatchPlan, side_MX: Tensor) -> None:
        _, ids_MK = _read_side(plan, side_MX)
        node_start = self.inter.rank * self.per_node
        if len(plan.fans) < len(self.links):
            to_rank = ExpertTargets(node_start, self.per_rank, self.intra.size)
            plan.fans.append(fan_out_of(ids_MK, to_rank, sum(plan.sent[1])))
            return
        rank_start = node_start + self.intra.rank * self.per_rank
        to_expert = ExpertTargets(rank_start, 1, self.per_rank)
        rows, plan.entry_of_row = fan_out_with_entries(ids_MK, to_expert, plan.rows)
        plan.fans.append(rows)

    def _row_gates(self, plan: DispatchPlan, side_MX: Tensor) -> Tensor:
        gates_MK, _ = _read_side(plan, side_MX)
        assert plan.entry_of_row is not None
        return gates_MK.flatten().index_select(0, plan.entry_of_row)

    def _gate_grads_by_token(self, plan: DispatchPlan, side_CX: Tensor) -> Tensor:
        return collect(side_CX, plan.fans[0])


def _read_side(plan: DispatchPlan, side_MX: Tensor) -> tuple[Tensor, Tensor]:
    """Return gates_MK and ids_MK (int16 expert ids) of received messages."""
    entries = plan.ids_TK.shape[1]
    words = entries * plan.gates_dtype.itemsize // 4
    ids_MK = side_MX[:, words:].view(torch.int16)[:, :entries]
    return from_words(side_MX[:, :words], plan.gates_dtype), ids_MK
