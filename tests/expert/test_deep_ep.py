"""DeepEPDispatcher against a stand-in for the package: gloo collectives with the results that DeepEP documents.

This holds our half to the contract; the package itself needs GPUs and is not run here.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_flatten, tree_unflatten

from parallel.exchange import gather
from parallel.expert.build import build_dispatcher
from tests.expert import test_dispatch as common
from tests.ranks import plain, run_ranks, tensor_of

WIDTH = 256


def gather_tensors(tree):
    """Every rank's tensors, in tuples as the own ones; None stays None."""
    leaves, shape = tree_flatten(tree)
    parts = gather([None if leaf is None else plain(leaf) for leaf in leaves])
    return [tree_unflatten([None if leaf is None else tensor_of(leaf) for leaf in part], shape) for part in parts]


class Buffer:
    """deep_ep.Buffer as documented: one arrival per token and rank that holds one of its experts."""

    def __init__(self, group, num_nvl_bytes, num_rdma_bytes):
        assert num_nvl_bytes == num_rdma_bytes == WIDTH * 2
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    @staticmethod
    def get_dispatch_config(ranks):
        return SimpleNamespace(
            get_nvl_buffer_size_hint=lambda row_bytes, ranks: row_bytes,
            get_rdma_buffer_size_hint=lambda row_bytes, ranks: row_bytes,
        )

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx, num_experts):
        self.local = num_experts // self.size
        in_rank = torch.stack([(topk_idx // self.local == rank).any(1) for rank in range(self.size)], 1)
        return in_rank.sum(0), None, topk_idx.flatten().bincount(minlength=num_experts), in_rank, None

    def dispatch(self, x, handle=None, topk_idx=None, topk_weights=None, is_token_in_rank=None, **layout):
        parts = x if isinstance(x, tuple) else (x,)
        assert handle is not None or sorted(layout) == [
            "num_tokens_per_expert",
            "num_tokens_per_rank",
            "num_tokens_per_rdma_rank",
        ]
        in_rank = is_token_in_rank if handle is None else handle[self.rank]
        sources = gather_tensors((tuple(part.view(torch.uint8) for part in parts), in_rank, topk_idx, topk_weights))
        received = []
        for index, part in enumerate(parts):
            bytes_RB = torch.cat([source[0][index][source[1][:, self.rank]] for source in sources])
            received.append(bytes_RB.view(part.dtype))
        received = tuple(received) if len(parts) == 2 else received[0]
        if handle is not None:
            return received, None, None, None, None, None
        ids = torch.cat([source[2][source[1][:, self.rank]] for source in sources]) - self.rank * self.local
        here = (ids >= 0) & (ids < self.local)
        weights = torch.cat([source[3][source[1][:, self.rank]] for source in sources]).where(here, 0.0)
        counts = [int((ids == expert).sum()) for expert in range(self.local)]
        return received, ids.where(here, -1), weights, counts, [source[1] for source in sources], None

    def combine(self, x, handle, topk_weights=None):
        weights = topk_weights if topk_weights is not None else x.new_zeros(x.shape[0], 1)
        lengths = [int(in_rank[:, self.rank].sum()) for in_rank in handle]
        experts = gather_tensors((x.split(lengths), weights.split(lengths)))
        mine = handle[self.rank]
        y, total = x.new_zeros(mine.shape[0], x.shape[1]), weights.new_zeros(mine.shape[0], weights.shape[1])
        for rank, (rows, side) in enumerate(experts):
            y[mine[:, rank]] += rows[self.rank]
            total[mine[:, rank]] += side[self.rank]
        return y, None if topk_weights is None else total, None


def check(rank: int) -> None:
    sys.modules["deep_ep"] = SimpleNamespace(Buffer=Buffer, topk_idx_t=torch.int64)
    common.WIDTH = WIDTH
    for wire, quantized in (("bf16", False), ("fp8", False), ("fp8", True)):
        case = common.Case("deepep", wire, tokens=(6, 0, 9), dtype=torch.bfloat16)
        world = common.make_world(case)
        dispatcher = build_dispatcher(
            "deepep", experts=8, wire=wire, quantized=quantized, ep_group=dist.group.WORLD, width=WIDTH
        )
        common.compare(case, common.run_case(dispatcher, world), common.expected(case, world))


@pytest.mark.parametrize("ranks", [2, 4])
def test_equals_one_process(ranks):
    run_ranks(check, world_size=ranks)
