"""Pieces of sequences: every position is somewhere once, the work is even, and blocks put together are the whole attention."""

from types import SimpleNamespace

import pytest
import torch

from train.kernels.plain.plain_attention import PlainAttention
from train.model.attention import AttentionInput, AttentionOutput
from train.model.sequence import Positions

T, N = 24, 3
DOCUMENTS = torch.tensor([[0] * 7 + [1] * 13 + [2] * 4, [0] * 24], dtype=torch.int32)


def positions_of(rank: int, documents_BT=None) -> Positions:
    return Positions(T, documents_BT, SimpleNamespace(parts=N, part=rank))


def test_pieces_cover_the_sequence_and_the_work_is_even():
    here = [positions_of(rank).here for rank in range(N)]
    assert sorted(t for pieces in here for piece in pieces for t in piece) == list(range(T))
    work = {sum(t + 1 for piece in pieces for t in piece) for pieces in here}
    assert len(work) == 1


@pytest.mark.parametrize("rank", range(N))
def test_what_belongs_to_the_positions_of_an_mtp_depth(rank):
    """The tokens further on, also where they lie behind the end of a piece."""
    places, tokens_BS = positions_of(rank), torch.arange(T + 1).expand(2, -1)
    with_next = places.take_with_next(tokens_BS, 2)
    for depth in range(3):
        left = places.shorter(depth) if depth else places
        here = torch.tensor([t for piece in left.here for t in piece])
        assert left.count == len(here) and here.max() < T - depth
        assert torch.equal(places.shifted(with_next, 2, depth)[1], here + depth)
        assert torch.equal(left.take(tokens_BS, depth + 1)[0], here + depth + 1)
        assert torch.equal(here, torch.tensor([t for piece in places.here for t in piece])[: left.count])


@pytest.mark.parametrize("documents_BT", [None, DOCUMENTS], ids=["whole", "documents"])
def test_blocks_put_together_are_the_whole_attention(documents_BT):
    """Outputs, log-sum-exps and gradients: the same sums in another order, in fp32."""
    draw = torch.Generator().manual_seed(1)
    q, k, v, dout = (torch.randn(2, 2, T, width, generator=draw, dtype=torch.float64) for width in (6, 6, 4, 4))
    scores = (q @ k.mT * 0.4).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    if documents_BT is not None:
        scores.masked_fill_(documents_BT[:, None, :, None] != documents_BT[:, None, None, :], -torch.inf)
    core, all_here = PlainAttention(), AttentionInput(q, k, v, 0.4, Positions(T, documents_BT).seen[0])
    made = core.forward(all_here)
    want, want_grads = made.out_BHTV, core.backward(dout, all_here, made)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for rank in range(N):
        places = positions_of(rank, documents_BT)
        take = lambda x, places=places: places.take(x.transpose(1, 2)).transpose(1, 2)  # noqa: E731
        blocks = [slice(piece.start, piece.stop) for piece in places.pieces]
        given = [
            AttentionInput(take(q), k[:, :, keys], v[:, :, keys], 0.4, seen)
            for keys, seen in zip(blocks, places.seen, strict=True)
        ]
        parts = [core.forward(block) for block in given]
        lse = torch.stack([part.lse_BHT.double() for part in parts]).logsumexp(0)
        out = sum(part.out_BHTV * (part.lse_BHT - lse).exp().unsqueeze(-1) for part in parts)
        torch.testing.assert_close(lse, take(scores.logsumexp(-1).unsqueeze(-1))[..., 0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(out.double(), take(want), rtol=1e-5, atol=1e-6)
        dq = torch.zeros_like(take(q))
        for keys, block in zip(blocks, given, strict=True):
            more = core.backward(take(dout), block, AttentionOutput(out, lse.float()))
            dq += more[0]
            dk[:, :, keys] += more[1]
            dv[:, :, keys] += more[2]
        torch.testing.assert_close(dq, take(want_grads[0]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dk, want_grads[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dv, want_grads[2], rtol=1e-5, atol=1e-6)
