"""Flat dispatch: one all-to-all over the expert-parallel group, with variable split sizes. No token is dropped.

Every (token, expert) pair is one message: an encoded row and a gate.

    1. Sort the pairs by expert, and so by rank.
    2. Exchange the number of pairs per expert, and copy the split sizes to the host.
    3. Exchange the messages.
    4. Sort the received messages by expert.

Shapes besides those of dispatcher.py: P ranks, E experts in all, L experts per rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.expert.dispatcher import ChainDispatcher, DispatchPlan, from_words
from parallel.expert.link import Link
from parallel.expert.permute import sort_entries
from parallel.expert.wire import Wire


class AllToAllDispatcher(ChainDispatcher):
    """Dispatcher over the ranks of one group; rank r holds experts [r*E/P, (r+1)*E/P).

    group: None if this rank holds all experts. experts: E.
    """

    def __init__(self, group: dist.ProcessGroup | None, experts: int, ranks_per_node: int, wire: Wire):
        size = 1 if group is None else dist.get_world_size(group)
        super().__init__([Link(group, [rank // ranks_per_node for rank in range(size)])], wire)
        self.experts = experts

    def _plan(self, expert_ids_TK: Tensor) -> DispatchPlan:
        ranks = self.links[0].size
        ids = expert_ids_TK.flatten()
        counts_PL = ids.new_zeros(self.experts).scatter_add_(0, ids, torch.ones_like(ids)).view(ranks, -1)
        transfer = self.links[0].start_counts(counts_PL, self.counters.forward)
        pairs = sort_entries(expert_ids_TK)
        arriving_PL = transfer.wait()
        sent, received = torch.stack([counts_PL.sum(1), arriving_PL.sum(1)]).tolist()
        local_L = torch.arange(arriving_PL.shape[1], device=ids.device)
        expert_R = local_L.repeat(ranks).repeat_interleave(arriving_PL.flatten(), output_size=sum(received))
        arrivals = sort_entries(expert_R[:, None])
        return DispatchPlan([sent], [received], sum(received), arriving_PL.sum(0), expert_ids_TK, [pairs, arrivals])

    def _first_copies(self, plan: DispatchPlan, words_TW: Tensor, gates_TK: Tensor) -> Tensor:
        pairs = plan.fans[0]
        width = words_TW.shape[1]
        gates_CX = gates_TK.reshape(-1, 1).view(torch.int32)
        message_CX = words_TW.new_empty(pairs.source_C.numel(), width + gates_CX.shape[1])
        torch.index_select(words_TW, 0, pairs.source_C, out=message_CX[:, :width])
        # copy_C is the position of each (token, entry) among the copies, so gates written there are sorted like them.
        message_CX[:, width:].index_copy_(0, pairs.copy_C, gates_CX)
        return message_CX

    def _learn(self, plan: DispatchPlan, side_MX: Tensor) -> None:
        raise AssertionError("all fan-outs of the flat dispatch are known beforehand")

    def _row_gates(self, plan: DispatchPlan, side_MX: Tensor) -> Tensor:
        return from_words(side_MX, plan.gates_dtype)[:, 0].index_select(0, plan.fans[1].source_C)

    def _gate_grads_by_message(self, plan: DispatchPlan, grads_R: Tensor) -> Tensor:
        return grads_R.index_select(0, plan.fans[1].copy_C)[:, None]

    def _gate_grads_by_token(self, plan: DispatchPlan, side_CX: Tensor) -> Tensor:
        return side_CX[:, 0].index_select(0, plan.fans[0].copy_C).view(plan.ids_TK.shape)
