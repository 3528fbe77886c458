"""What ranks that share sequences exchange: the pieces in their order, the transpose of it, and the bytes of the formula."""

import pytest
import torch

from bench.context import build, formula, latents_sent
from conf.load import compose
from parallel.context import ContextParallel, LoneContext
from parallel.layout import Layout
from parallel.mesh import build_mesh
from tests.ranks import run_ranks
from train.model.sequence import Positions

T, CHANNELS = 16, 3


def exchange(rank: int) -> None:
    """Whole sequences and one position fewer, as an MTP depth has them."""
    share = ContextParallel(build_mesh(Layout(cp=2)).cp_group)
    whole_BTX = torch.arange(2 * T * CHANNELS, dtype=torch.float32).view(2, T, CHANNELS)
    for positions in (Positions(T, None, share), Positions(T, None, share).shorter(1)):
        pieces = share.gather_begin(positions.take(whole_BTX), [len(piece) for piece in positions.pieces]).wait()
        assert torch.equal(torch.cat(pieces, 1), whole_BTX[:, : positions.length])
        summed = share.scatter_sum([piece * (rank + 1) for piece in pieces])
        assert torch.equal(summed, 3 * positions.take(whole_BTX))
    assert torch.equal(share.total(torch.tensor([rank, 1])), torch.tensor([1, 2]))
    taken, sent = share.counters.take(), 2 * T // 2 * CHANNELS * 4  # of what a rank has, to the other
    assert (taken.forward.inside_bytes, taken.backward.inside_bytes) == (2 * sent, 2 * sent)


def test_what_travels_is_put_in_order_and_summed():
    run_ranks(exchange, world_size=2)


def count_step(rank: int, overrides: list[str]) -> None:
    config = compose(*overrides)
    parts, run = build(config)
    run(1)
    assert latents_sent(parts) == formula(config) > 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_latents_alone_travel_between_ranks_that_share_sequences(precision):
    """Of a step with MTP: three times as many latents as a layer has, less its own."""
    words = ["conf=tiny", "cluster.device=cpu", "seq_len=64", "batch_size=2", "micro_batch_size=1", "parallel.cp=2"]
    run_ranks(count_step, [*words, f"precision={precision}"], world_size=2)


def test_a_lone_rank_sees_copies_of_its_own():
    share = LoneContext(3, 1)
    own_BTX = torch.randn(1, 4, CHANNELS)
    pieces = share.gather_begin(own_BTX, [2] * 6).wait()
    assert all(torch.equal(piece, own_BTX[:, :2]) for piece in pieces[:3]) and len(pieces) == 6
    assert torch.equal(share.scatter_sum(pieces), 3 * own_BTX)
