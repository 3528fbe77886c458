"""How a GPU's attention is cut into calls on rectangles and how the results are combined, with plain versions of
torch's kernels on the CPU."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from train.kernels.gpu import fused_attention
from train.kernels.gpu.fused_attention import (
    LSE_ROWS,
    WASTE,
    AttentionByKind,
    CudnnAttention,
    EfficientAttention,
    FlashAttention,
    calls,
)
from train.kernels.plain.plain_attention import PlainAttention
from train.model.attention import AttentionInput, AttentionOutput
from train.model.sequence import Positions, Rectangle, SeenKeys

PLAIN = PlainAttention()
T = 70
DOCUMENTS = torch.tensor([[0] * 30 + [1] * 33 + [2] * 7, [4] + [5] * 69], dtype=torch.int32)
PIECES = [Rectangle(None, 0, 40, 0, 40, 0), Rectangle(None, 40, 70, 0, 40, 40)]
CASES = {
    "whole": Positions(T).seen[0],
    "documents": Positions(T, DOCUMENTS).seen[0],
    "a block of keys": SeenKeys(PIECES),
    "a block within documents": SeenKeys([Rectangle(0, 3, 20, 3, 20, 0), Rectangle(0, 20, 40, 20, 40, 0), Rectangle(1, 40, 70, 5, 40, 35)]),
}  # fmt: skip


def draw(keys: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, as the model has them: positions before heads, values in rows behind keys."""
    generator, shapes = torch.Generator().manual_seed(0), ((T, 12), (keys, 12), (keys, 16), (T, 8))
    q, k, kv, dout = (torch.randn(2, rows, 3, width, generator=generator).transpose(1, 2) for rows, width in shapes)
    return [q, k, kv[..., 8:], dout]


def given_to(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> AttentionInput:
    return AttentionInput(
        q, k, v, scale, SeenKeys([Rectangle(None, 0, q.size(2), 0, k.size(2), 0 if causal else k.size(2))])
    )


def padded(lse: Tensor) -> Tensor:
    return torch.nn.functional.pad(lse, (0, -lse.size(-1) % LSE_ROWS), value=torch.inf)


def dense(q, k, v, bias, keep, dropout, causal, *, scale):
    made = PLAIN.forward(given_to(q, k, v, scale, causal))
    return made.out_BHTV, padded(made.lse_BHT), None, None


def dense_backward(dout, q, k, v, bias, out, lse, seed, offset, dropout, wanted, causal, *, scale):
    assert lse.size(-1) % LSE_ROWS == 0 and bias is None and out.stride(1) == out.size(3)
    made = AttentionOutput(out, lse[..., : q.size(2)])
    return *PLAIN.backward(dout, given_to(q, k, v, scale, causal), made), None


def of_documents(bounds: Tensor, longest: int, *tensors: Tensor) -> list[list[Tensor]]:
    """Tensors (1, M, H, width), cut, and heads first."""
    ends = bounds.tolist()
    assert bounds.dtype == torch.int32 and longest == max(bounds.diff().tolist()) and len(tensors[0]) == 1
    return [[t[:, a:b].transpose(1, 2) for t in tensors] for a, b in pairwise(ends)]


def documents(q, k, v, bias, bounds, key_bounds, longest, longest_key, dropout, mask, keep, *, scale):
    assert bounds is key_bounds and mask == 1
    made = [PLAIN.forward(given_to(*one, scale, True)) for one in of_documents(bounds, longest, q, k, v)]
    lse = torch.full((len(made), q.size(2), longest + -longest % LSE_ROWS), torch.nan)
    for row, one in zip(lse, made, strict=True):
        row[:, : one.lse_BHT.size(-1)] = one.lse_BHT[0]
    return torch.cat([one.out_BHTV for one in made], 2).transpose(1, 2), lse, None, None, longest, longest


def documents_backward(
    dout,
    q,
    k,
    v,
    bias,
    out,
    bounds,
    key_bounds,
    longest,
    longest_key,
    lse,
    dropout,
    seed,
    offset,
    mask,
    bias_too,
    *,
    scale,
):
    assert bounds is key_bounds and mask == 1 and not bias_too and out.stride(2) == out.size(3)
    parts = []
    for row, (*qkv, grad, made) in zip(lse, of_documents(bounds, longest, q, k, v, dout, out), strict=True):
        rows = made.size(2)
        assert row[:, rows:].isposinf().all()
        parts.append(PLAIN.backward(grad, given_to(*qkv, scale, True), AttentionOutput(made, row[None, :, :rows])))
    return *(torch.cat(grads, 2).transpose(1, 2) for grads in zip(*parts, strict=True)), None


def cudnn(q, k, v, bias, keep, dropout, causal, *, scale):
    made = PLAIN.forward(given_to(q, k, v, scale, causal))
    return made.out_BHTV, made.lse_BHT.unsqueeze(-1), *[None] * 7


def cudnn_backward(
    dout, q, k, v, out, lse, seed, offset, bias, bounds, key_bounds, queries, keys, dropout, causal, *, scale
):
    assert lse.shape == (*q.shape[:3], 1) and (queries, keys) == (q.size(2), k.size(2))
    return PLAIN.backward(dout, given_to(q, k, v, scale, causal), AttentionOutput(out, lse.squeeze(-1)))


def flash(q, k, v, bounds, key_bounds, longest, longest_key, dropout, causal, debug, *, scale):
    """Positions before heads, all of one width; with bounds without the axis of sequences."""
    assert q.size(-1) == k.size(-1) == v.size(-1) and bounds is key_bounds
    if bounds is None:
        assert (longest, longest_key) == (q.size(1), k.size(1))
        made = PLAIN.forward(given_to(*(t.transpose(1, 2) for t in (q, k, v)), scale, causal))
        return made.out_BHTV.transpose(1, 2), made.lse_BHT, None, None, None
    assert causal and longest == longest_key
    cut = of_documents(bounds, longest, *(t.unsqueeze(0) for t in (q, k, v)))
    made = [PLAIN.forward(given_to(*one, scale, True)) for one in cut]
    out_MHV = torch.cat([one.out_BHTV for one in made], 2)[0].transpose(0, 1)
    return out_MHV, torch.cat([one.lse_BHT for one in made], 2)[0], None, None, None


def flash_backward(
    dout, q, k, v, out, lse, bounds, key_bounds, longest, longest_key, dropout, causal, seed, offset, *, scale
):
    assert {t.size(-1) for t in (dout, q, k, v, out)} == {q.size(-1)} and bounds is key_bounds
    if bounds is None:
        dout, q, k, v, out = (t.transpose(1, 2) for t in (dout, q, k, v, out))
        grads = PLAIN.backward(dout, given_to(q, k, v, scale, causal), AttentionOutput(out, lse))
        return tuple(grad.transpose(1, 2) for grad in grads)
    assert causal and lse.shape == (q.size(1), q.size(0))
    parts, first = [], 0
    for *qkv, grad, made in of_documents(bounds, longest, *(t.unsqueeze(0) for t in (q, k, v, dout, out))):
        last = first + made.size(2)
        parts.append(PLAIN.backward(grad, given_to(*qkv, scale, True), AttentionOutput(made, lse[None, :, first:last])))
        first = last
    return tuple(torch.cat(grads, 2)[0].transpose(0, 1) for grads in zip(*parts, strict=True))


@pytest.fixture
def kernels(monkeypatch):
    defined = SimpleNamespace(
        _scaled_dot_product_efficient_attention=dense,
        _scaled_dot_product_efficient_attention_backward=dense_backward,
        _efficient_attention_forward=documents,
        _efficient_attention_backward=documents_backward,
        _flash_attention_forward=flash,
        _flash_attention_backward=flash_backward,
        _scaled_dot_product_cudnn_attention=cudnn,
        _scaled_dot_product_cudnn_attention_backward=cudnn_backward,
    )
    monkeypatch.setattr(fused_attention, "ATEN", defined)


CORES = {
    "efficient": EfficientAttention(),
    "flash": FlashAttention(),
    "cudnn": AttentionByKind(CudnnAttention(), FlashAttention()),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
def test_results_are_those_of_the_reference(kernels, case, core):
    """The same sums in another order; in backward with the log-sum-exp over more keys than these."""
    seen = CASES[case]
    *inputs, dout = draw(max(one.last_key for one in seen.rectangles))
    given = AttentionInput(*inputs, 0.4, seen)
    want, got = (one.forward(given, keep=True, largest=True) for one in (PLAIN, core))
    torch.testing.assert_close(got[:3], want[:3], rtol=1e-5, atol=1e-6)
    assert got.out_BHTV.stride(1) == got.out_BHTV.size(3)
    met = AttentionOutput(want.out_BHTV, want.lse_BHT + 0.5)
    torch.testing.assert_close(core.backward(dout, given, met), PLAIN.backward(dout, given, met), rtol=1e-5, atol=1e-6)


def test_pieces_of_documents_are_never_asked_of_cudnn(kernels, monkeypatch):
    """It makes a plan for every length: a long document that has a call by itself, and what ranks that share sequences ask."""
    monkeypatch.delattr(fused_attention.ATEN, "_scaled_dot_product_cudnn_attention")
    monkeypatch.delattr(fused_attention.ATEN, "_scaled_dot_product_cudnn_attention_backward")
    *inputs, dout = draw(T)
    for rectangles in (
        [Rectangle(0, 3, 20, 3, 20, 0)],
        [Rectangle(1, 40, 70, 5, 40, 35)],
        CASES["documents"].rectangles,
    ):
        given = AttentionInput(*inputs, 0.4, SeenKeys(rectangles))
        made = CORES["cudnn"].forward(given, keep=True)
        CORES["cudnn"].backward(dout, given, made)
        with pytest.raises(AssertionError, match="documents have a core of their own"):
            CudnnAttention().forward(given)


def test_documents_of_a_sequence_share_a_call():
    first, second = CASES["documents"].once(calls, torch.device("cpu"))
    assert (first.sequences, first.queries, first.causal) == (slice(0, 1), slice(0, T), True)
    assert first.documents.bounds.tolist() == [0, 30, 63, 70] and first.documents.longest == 33
    assert second.documents.bounds.tolist() == [0, 1, 70] and second.causal and second.queries == slice(0, T)
    assert CASES["documents"].once(calls, torch.device("cpu"))[0] is first


def test_log_sum_exps_of_a_call_are_few_where_one_document_is_long():
    """500 short documents before and after a long one: not 1001 times its length."""
    lengths = [2] * 500 + [3000] + [2] * 500
    documents_BT = torch.repeat_interleave(torch.tensor(lengths))[None]
    found = calls(Positions(sum(lengths), documents_BT).seen[0].rectangles, torch.device("cpu"))
    made = [(len(one.documents.bounds) - 1) * one.documents.longest if one.documents else 0 for one in found]
    assert sum(made) <= WASTE * sum(lengths) and len(found) < 5
    assert [one.queries.start for one in found[1:]] == [one.queries.stop for one in found[:-1]]


def test_flash_attention_takes_short_documents_and_a_long_one_at_once():
    lengths = [2] * 500 + [3000] + [2] * 500
    seen = Positions(sum(lengths), torch.repeat_interleave(torch.tensor(lengths))[None]).seen[0]
    (one,) = seen.once(calls, torch.device("cpu"), CORES["cudnn"].waste)
    assert one.documents.longest == 3000 and len(one.documents.bounds) == 1002
