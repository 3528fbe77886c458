"""The GPU kernels between the matmuls, in Triton's interpreter, against torch's operations
(train/kernels/plain/plain_kernels.py).

Collected by test_fused_kernels.py in a process of its own, with TRITON_INTERPRET=1: triton reads it when it is first imported.
"""

from contextlib import nullcontext

import pytest
import torch

from bench.gpu import interpreter
from conf.thresholds import lowered
from tests.ghost import interpreted_traffic
from train.kernels.gpu import triton_index, triton_scores
from train.kernels.gpu.fused_kernels import FusedKernels
from train.kernels.plain.plain_attention import PlainAttention
from train.kernels.plain.plain_kernels import PlainKernels
from train.model.attention import AttentionInput
from train.model.chosen_attention import ChosenInput
from train.model.indexer import AttentionTarget, IndexVectors, best_keys, index_scores
from train.model.operations import RoutingRule
from train.model.sequence import Positions, Rectangle, SeenKeys
from train.prove.double import in_double

torch.set_num_threads(1)
OURS, PLAIN = FusedKernels(), PlainKernels()
FLIP = {"rtol": 2.0**-7, "atol": 1e-6}
"""fp32 results that differ in their last bits (exp, the order of a sum) may round to neighbouring numbers of bf16."""


@pytest.fixture(autouse=True)
def rounding(monkeypatch) -> None:
    interpreter.repair(monkeypatch.setattr)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("rows, width", [(0, 64), (1, 64), (7, 96), (33, 600)])
@pytest.mark.parametrize("gated", [False, True])
def test_swiglu(rows, width, gated):
    h, grad, gates = draw(rows, 2 * width), draw(rows, width, seed=1), None
    h[:1] *= 100  # exp of its negative is infinite
    if gated:
        gates = torch.rand(rows, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(OURS.swiglu(h, gates), PLAIN.swiglu(h, gates), **FLIP)
    dh, dgates = OURS.swiglu_backward(grad, h, gates)
    expected_dh, expected_dgates = PLAIN.swiglu_backward(grad, h, gates)
    torch.testing.assert_close(dh, expected_dh, **FLIP)
    if gated:
        # a sum of `width` products in another order: each addition is off by 2^-24 of what is summed so far
        gate, up = h.float().chunk(2, 1)
        size = (torch.nn.functional.silu(gate) * up * grad).abs().sum(1, keepdim=True)
        assert ((dgates - expected_dgates)[:, None].abs() <= (width + 8) * 2.0**-24 * size).all()
    else:
        assert dgates is None


@pytest.mark.parametrize("batch, length, heads, nope, rope, value", [
    (2, 5, 3, 16, 8, 16), (1, 1, 2, 24, 8, 12), (1, 17, 4, 128, 64, 128), (1, 0, 2, 16, 8, 16),
])  # fmt: skip
def test_heads_have_the_bits_of_the_plain_form(batch, length, heads, nope, rope, value):
    """Also from a rope key that is a part of wider rows, and from gradients with positions before heads."""
    q, kv = draw(batch, length, heads, nope + rope), draw(batch, length, heads, nope + value, seed=1)
    k_rope = draw(batch, length, 8 + rope, seed=2)[..., 8:]
    table = torch.polar(torch.ones(length, rope // 2), draw(length, rope // 2, seed=3).float())
    inputs = [t.requires_grad_() for t in (q, kv, k_rope)]
    # the first is written over
    ours, expected = (kernels.to_heads(q.clone(), kv, k_rope, table, nope) for kernels in (OURS, PLAIN))
    assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))
    grads = [draw(batch, length, heads, out.size(3), seed=4 + i).transpose(1, 2) for i, out in enumerate(ours)]
    dq, dkv, dk_rope = torch.autograd.grad(ours, inputs, grads)
    expected = torch.autograd.grad(expected, inputs, grads)
    assert torch.equal(dq, expected[0]) and torch.equal(dkv, expected[1])
    torch.testing.assert_close(dk_rope, expected[2], **FLIP)


@pytest.mark.parametrize("rows, width, experts", [(0, 24, 8), (1, 24, 8), (37, 136, 12)])
def test_the_router_multiplies_bf16_in_fp32(rows, width, experts):
    """Its gradient goes as two numbers of bf16, which hold it to 2^-17; sums of products are in another order."""
    x, weight, grad = draw(rows, width), draw(experts, width, seed=1), draw(rows, experts, seed=2).float() * 1.2345678
    torch.testing.assert_close(OURS.logits(x, weight), PLAIN.logits(x, weight), rtol=1e-5, atol=1e-5)
    dx, dweight = OURS.logits_backward(grad, x, weight, True, True)
    expected_dx, expected_dweight = PLAIN.logits_backward(grad, x, weight, True, True)
    assert dx.dtype == torch.bfloat16 and dweight.dtype == torch.float32
    assert ((dweight - expected_dweight).abs() <= 2.0**-16 * (grad.abs().t() @ x.float().abs())).all()
    size = grad.abs() @ weight.float().abs()
    assert ((dx.float() - expected_dx.float()).abs() <= 2.0**-7 * expected_dx.float().abs() + 2.0**-16 * size).all()
    assert OURS.logits_backward(grad, x, weight, False, False) == (None, None)


def test_on_the_meta_device_results_are_as_large():
    """A plan runs them there, also where triton is missing."""
    h, gates = torch.empty(4, 16, device="meta", dtype=torch.bfloat16), torch.empty(4, device="meta")
    assert OURS.swiglu(h, gates).shape == (4, 8)
    assert [t.shape for t in OURS.swiglu_backward(h[:, :8], h, gates)] == [(4, 16), (4,)]
    given = chosen_input(torch.bfloat16, 1, 9, 9, 3, 4, 32, 8, 0)
    there = ChosenInput(*(one.to("meta") if isinstance(one, torch.Tensor) else one for one in given))
    made, results = OURS.attend_chosen(given), OURS.attend_chosen(there)
    results += OURS.attend_chosen_backward(results.out_BTHV, there, results.out_BTHV, results.lse_BTH)
    made += OURS.attend_chosen_backward(made.out_BTHV, given, made.out_BTHV, made.lse_BTH)
    assert [(t.shape, t.dtype) for t in results] == [(t.shape, t.dtype) for t in made]


@pytest.mark.parametrize("batch, length, experts, rule", [
    (2, 21, 16, RoutingRule(4, 4, 2, 2.5, 2)), (1, 1, 8, RoutingRule(2, 1, 1, 1.0, 2)), (1, 40, 20, RoutingRule(3, 5, 3, 2.5, 2)),
    (1, 18, 256, RoutingRule(8, 8, 4, 2.5, 2)), (1, 0, 8, RoutingRule(2, 2, 1, 1.0, 2)),
])  # fmt: skip
@pytest.mark.parametrize("weight", [None, 0.0, 0.3], ids=["uncounted", "counted", "balanced"])
def test_the_router_chooses_the_same(batch, length, experts, rule, weight):
    """Equal scores among them, which go to the lower index; sums of at most 256 numbers differ in the last bits of fp32."""
    logits = (8 * draw(batch, length, experts).float()).round() / 8
    bias = (draw(experts, seed=1).float() * 4).round() / 64
    results = []
    for kernels in (OURS, PLAIN):
        x = logits.clone().requires_grad_()
        counters = torch.ones(experts, dtype=torch.int64), torch.ones(experts), torch.tensor(1.0)
        gates, ids = kernels.route(
            x, bias, rule, weight or 0.0, None if weight is None else counters, Positions(length)
        )
        (dx,) = torch.autograd.grad(gates, x, draw(*gates.shape, seed=2).float())
        results.append((gates, dx, ids, *counters))
    (gates, dx, ids, *counters), (expected_gates, expected_dx, expected_ids, *expected_counters) = results
    assert torch.equal(ids, expected_ids) and torch.equal(counters[0], expected_counters[0])
    torch.testing.assert_close(gates, expected_gates, rtol=2e-6, atol=0)
    torch.testing.assert_close(
        dx, expected_dx, rtol=1e-4, atol=1e-7
    )  # differences of numbers near 1, off by some 2^-24
    for one, other in zip(counters[1:], expected_counters[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("case", ["whole", "documents", "a block of keys"])
def test_largest_scores_or_a_bound_of_small_ones(case, share):
    """In fp32 products: 1e-6 of the sums. A block of queries is told its log-sum-exps where all are at most the limit."""
    length, block = 150, Rectangle(None, 70, 150, 0, 150, 70)
    documents = torch.tensor([[0] * 30 + [1] * 120, [4] + [5] * 149], dtype=torch.int32)
    seen = {
        "whole": Positions(length).seen[0],
        "documents": Positions(length, documents).seen[0],
        "a block of keys": SeenKeys([block]),
    }[case]
    q, k, v = (draw(2, length, 3, 40, seed=seed).transpose(1, 2) for seed in range(3))
    given = AttentionInput(q, k, v, 0.3, seen)
    exact = PlainAttention().forward(given, largest=True)
    bound = exact.lse_BHT
    blocks = bound.split(triton_scores.M, -1)
    most = torch.stack([one.amax(-1) for one in blocks])
    limit = most[most.isfinite()].quantile(share).item() if share else -float("inf")
    made = triton_scores.largest_scores(given, bound, limit)
    told = torch.cat([(one.amax(-1, keepdim=True) <= limit).expand_as(one) for one in blocks], -1)
    assert told.any() or not share or case == "a block of keys"
    assert told.all() == (share == 1.0)
    torch.testing.assert_close(made, bound.where(told, exact.largest_BHT), rtol=1e-5, atol=1e-5)
    assert (made >= exact.largest_BHT - 1e-5).all()


def test_largest_scores_where_places_take_more_than_32_bits(monkeypatch):
    """Heads of V3 side by side, 128 times 192 columns, so that the last rows lie beyond 2**31 elements. Memory that nothing touches takes none."""
    monkeypatch.setitem(
        interpreted_traffic._seen, "_largest_kernel", (2**62, 2**62)
    )  # nearly all of its tensors is not read
    length, seen, row = 87_488, 64, 128 * 192
    memory = torch.empty(2, length * row, dtype=torch.bfloat16)
    q, k = (one.as_strided((1, 1, length, 192), (length * row, 192, row, 1)) for one in memory)
    assert (length - seen) * row > 2**31
    drawn = [draw(1, 1, seen, 192, seed=seed).bfloat16() for seed in range(2)]
    for one, values in zip((q, k), drawn, strict=True):
        one[:, :, -seen:] = values
    given = AttentionInput(q, k, k, 0.3, SeenKeys([Rectangle(None, length - seen, length, length - seen, length, 0)]))
    lse = torch.full((1, 1, length), -float("inf"))
    lse[..., -seen:] = float("inf")
    made = triton_scores.largest_scores(given, lse, 0.0)[..., -seen:]
    scores = drawn[0].float() @ drawn[1].float().mT * 0.3
    exact = scores.masked_fill(~torch.ones(seen, seen).tril().bool(), -float("inf")).amax(-1)
    torch.testing.assert_close(made, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "queries, keys, heads, width", [(1, 1, 1, 8), (70, 140, 3, 128), (65, 300, 4, 12), (5, 0, 2, 16)]
)
def test_scores_of_an_indexer(queries, keys, heads, width):
    """fp32 sums of exact products in another order; also from a part of wider rows."""
    q, k = draw(queries, heads, width + 3)[..., :width], draw(keys, width + 3, seed=1)[:, :width]
    w = torch.randn(queries, heads, generator=torch.Generator().manual_seed(2))
    made, expected = triton_index.fused_index_scores(q, k, w), index_scores(q, k, w, 1 << 20)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "queries, keys, heads, width", [(1, 1, 1, 8), (70, 140, 3, 24), (65, 300, 2, 12), (5, 0, 2, 16)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_mean_attention_of_all_heads(queries, keys, heads, width, dtype):
    """fp32 sums of exact products in another order; also from a part of wider rows, and with keys that a query must not see."""
    q, k = draw(2, heads, queries + 2, width).to(dtype), draw(heads, keys, width + 3, seed=1)[..., :width].to(dtype)
    bias = torch.zeros(queries, keys).masked_fill_(
        torch.ones(queries, keys).triu(max(1, keys - queries)).bool(), -torch.inf
    )
    scores = q[1, :, :queries].float() @ k.float().mT * 0.3 + bias
    target = AttentionTarget(q, torch.full((2, heads, queries + 2), torch.inf), 0.3, lambda: iter([]))
    target.lse_BHT[1, :, :queries] = scores.logsumexp(-1)
    expected = PLAIN.mean_attention(target, 1, slice(0, queries), k, bias)
    made = triton_index.fused_mean_attention(q[1, :, :queries], k, target.lse_BHT[1, :, :queries], 0.3)
    torch.testing.assert_close(made.masked_fill_(bias == -torch.inf, 0), expected, rtol=1e-5, atol=1e-6)


def chosen_input(dtype, batch, queries, keys, top_k, heads, rank, rope, before) -> ChosenInput:
    """before: keys that come before the first query. Some queries see fewer keys than top_k, or none; many choose the same."""
    generator = torch.Generator().manual_seed(7)
    q, latents, weight = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((batch, queries, heads, 12 + rope), (batch, keys, rank + rope), (heads * (12 + 20), rank))
    )
    scores = torch.randn(batch, queries, keys, generator=generator)
    later = torch.arange(keys) > torch.arange(queries).unsqueeze(-1) + before
    return ChosenInput(q, latents, weight, 12, 0.2, best_keys(scores.masked_fill(later, -torch.inf), top_k))


CHOSEN = [  # queries, keys, top_k, heads, rank, rope, before
    (9, 9, 3, 4, 32, 8, 0), (5, 150, 80, 3, 24, 4, 77), (3, 20, 17, 70, 48, 16, -1), (2, 9, 12, 1, 16, 8, 7),
]  # fmt: skip


@pytest.mark.parametrize("sizes", CHOSEN, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("small", [False, True])
def test_attention_over_chosen_keys(sizes, dtype, small):
    """fp32: sums in another order. bf16: absorbed queries, probabilities and gradients of scores are rounded to 2^-9."""
    given = chosen_input(dtype, 2, *sizes)
    with lowered() if small else nullcontext():
        made, expected = OURS.attend_chosen(given), PLAIN.attend_chosen(given)
        dout = draw(*made.out_BTHV.shape, seed=3).to(dtype)
        grads = OURS.attend_chosen_backward(dout, given, made.out_BTHV, made.lse_BTH)
        plain = PLAIN.attend_chosen_backward(dout, given, expected.out_BTHV, expected.lse_BTH)
    none = (given.chosen_BTK < 0).all(-1)
    assert none.any() == (sizes[-1] < 0) and (made.lse_BTH[none] == -torch.inf).all() and not made.out_BTHV[none].any()
    assert not made.shares_BTK[given.chosen_BTK < 0].any() and not grads[0][none].any()
    bound = 2e-6 if dtype == torch.float32 else 2e-2
    for one, other in zip((*made, *grads), (*expected, *plain), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        finite = other.isfinite()
        assert torch.equal(finite, one.isfinite())
        assert (one - other)[finite].float().norm() <= bound * other[finite].float().norm()


@pytest.mark.parametrize("small", [False, True])
def test_the_loss_of_an_indexer_over_chosen_keys_for_more_queries_at_a_time(small):
    """Sums in another order."""
    chosen = chosen_input(torch.float32, 2, 9, 40, 7, 1, 16, 8, 3).chosen_BTK
    index = IndexVectors(draw(2, 9, 3, 8), draw(2, 40, 8, seed=1), draw(2, 9, 3, seed=2).float())
    shares = (chosen >= 0).float() / (chosen >= 0).sum(-1, keepdim=True)
    with lowered() if small else nullcontext():
        made, expected = (one.chosen_index_loss(index, chosen, shares, torch.ones(2, 9)) for one in (OURS, PLAIN))
    torch.testing.assert_close(made.loss, expected.loss)
    for one, other in zip(made.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(one, other, **FLIP)


def test_in_fp64_attention_over_chosen_keys_is_that_of_torch():
    """mode=prove runs it so."""
    given = chosen_input(torch.float32, 1, 9, 9, 3, 4, 32, 8, 0)
    with in_double():
        given = ChosenInput(*(one.double() for one in given[:3]), *given[3:])
        made, expected = OURS.attend_chosen(given), PLAIN.attend_chosen(given)
        dout = torch.ones_like(made.out_BTHV)
        grads = [one.attend_chosen_backward(dout, given, made.out_BTHV, made.lse_BTH) for one in (OURS, PLAIN)]
    for one, other in zip((*made, *grads[0]), (*expected, *grads[1]), strict=True):
        assert one.dtype == torch.float64 and torch.equal(one, other)
