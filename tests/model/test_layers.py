"""Norm, SwiGLU, attention, RoPE and embedding against plain formulas."""

import math

import pytest
import torch
from torch.nn import functional as F

from conf.schema import Model, Yarn
from conf.thresholds import THRESHOLDS
from train.kernels.choice import build_kernels
from train.kernels.plain.plain_attention import PlainAttention
from train.model.attention import AttentionInput
from train.model.layers import Embedding, RMSNorm, swiglu
from train.model.rope import Rope, rotate
from train.model.sequence import Positions

torch.set_num_threads(1)


def gradients(output, inputs, upstream):
    return torch.autograd.grad(output, inputs, upstream)


def test_rms_norm_equals_the_formula():
    torch.manual_seed(0)
    norm = RMSNorm(10, 1e-6, recompute=False, kernels=build_kernels("cpu"), dtype=torch.float32)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 4, 10, requires_grad=True)
    y = norm(x)
    expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * norm.weight
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    inputs = [x, norm.weight]
    torch.testing.assert_close(gradients(y, inputs, upstream), gradients(expected, inputs, upstream))


@pytest.mark.parametrize("with_gates", [False, True])
def test_swiglu_equals_the_formula(with_gates, monkeypatch):
    """In several pieces, the last one short."""
    rows, inner = 11, 6
    monkeypatch.setattr(THRESHOLDS, "gate_and_up", 4 * 2 * inner)
    torch.manual_seed(0)
    h = torch.randn(rows, 2 * inner, requires_grad=True)
    gates = torch.rand(rows, requires_grad=True) if with_gates else None
    out = swiglu(h, gates, build_kernels("cpu"))
    gate, up = h.chunk(2, -1)
    expected = F.silu(gate) * up * (gates[:, None] if with_gates else 1)
    torch.testing.assert_close(out, expected)
    inputs = [h, gates] if with_gates else [h]
    upstream = torch.randn_like(out)
    torch.testing.assert_close(gradients(out, inputs, upstream), gradients(expected, inputs, upstream))


def masked_scores(q, k, scale, documents_BT):
    length = q.size(2)
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    if documents_BT is not None:
        allowed = allowed & (documents_BT[:, :, None] == documents_BT[:, None, :]).unsqueeze(1)
    return (q @ k.transpose(-1, -2) * scale).masked_fill(~allowed, -torch.inf)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "length", [1, THRESHOLDS.attention_queries, THRESHOLDS.attention_queries + 9, 4 * THRESHOLDS.attention_queries + 9]
)
@pytest.mark.parametrize("heads_at_a_time", [2, 100])
def test_attention_equals_the_masked_formula(length, packed, heads_at_a_time, monkeypatch):
    monkeypatch.setattr(
        THRESHOLDS, "attention_scores", heads_at_a_time * min(length, THRESHOLDS.attention_queries) * length
    )
    torch.manual_seed(0)
    q, k = (torch.randn(2, 3, length, 6, dtype=torch.float32, requires_grad=True) for _ in range(2))
    v = torch.randn(2, 3, length, 4, requires_grad=True)
    documents_BT = None
    if packed:
        documents_BT = torch.sort(torch.randint(3, (2, length)), dim=1).values.int()
    given = AttentionInput(q, k, v, 0.4, Positions(length, documents_BT).seen[0])
    out = build_kernels("cpu").attention(given)
    scores = masked_scores(q, k, 0.4, documents_BT)
    expected = scores.softmax(-1) @ v
    torch.testing.assert_close(out, expected)
    made = PlainAttention().forward(given, largest=True)
    torch.testing.assert_close(made[1:3], (scores.logsumexp(-1), scores.amax(-1)))
    upstream = torch.randn_like(out)
    torch.testing.assert_close(gradients(out, [q, k, v], upstream), gradients(expected, [q, k, v], upstream))


def test_attention_in_bf16_is_as_exact_as_its_roundings():
    """Scores are in fp32, so even peaked softmaxes (scores near 50) stay within a few roundings of 2^-8."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 100, 16).bfloat16() for _ in range(3))
    out = build_kernels("cpu").attention(AttentionInput(q, k, v, 3.0, Positions(100).seen[0])).float()
    expected = (masked_scores(q.double(), k.double(), 3.0, None).softmax(-1) @ v.double()).float()
    assert (out - expected).norm() / expected.norm() < 5e-3


def test_rope_turns_adjacent_pairs():
    rope = Rope(Model(rope_head_dim=4, rope_theta=100.0), seq_len=8)
    x = torch.randn(1, 8, 2, 4)
    table = rope.table(8, x.device)
    got = rotate(x, table)
    for t in range(8):
        for pair, angle in ((0, t), (1, t / 10)):
            a, b = x[0, t, :, 2 * pair], x[0, t, :, 2 * pair + 1]
            torch.testing.assert_close(got[0, t, :, 2 * pair], a * math.cos(angle) - b * math.sin(angle))
            torch.testing.assert_close(got[0, t, :, 2 * pair + 1], a * math.sin(angle) + b * math.cos(angle))
    torch.testing.assert_close(rotate(got, table.conj()), x)


def test_yarn_of_deepseek_v3():
    """Ramp over pairs 10 to 23 of 32, mscale 1.3689, softmax scale 0.13523; off up to the original length."""
    config = Model(nope_head_dim=128, rope_head_dim=64, yarn=Yarn(factor=40.0, original_seq_len=4096))
    plain, long = Rope(config, 4096), Rope(config, 4097)
    assert plain.softmax_scale == pytest.approx(192**-0.5)
    assert long.softmax_scale == pytest.approx(0.13523, abs=1e-5)
    slowed = plain.frequencies() / long.frequencies()
    assert torch.allclose(slowed[:11], torch.ones(11))
    assert (slowed[11:23] > 1).all() and (slowed[11:23] < 40).all()
    assert torch.allclose(slowed[23:], torch.full((9,), 40.0))


def test_yarn_slows_by_degrees_also_where_no_pair_turns_as_slowly_as_beta_slow():
    """Pairs 2 to 6 of 4: the last, pair 3, is slowed by a quarter."""
    yarn = Yarn(factor=4.0, original_seq_len=4096, beta_fast=32.0, beta_slow=1.0)
    rope = Rope(Model(rope_head_dim=8, rope_theta=100.0, yarn=yarn), seq_len=8192)
    plain = 100.0 ** -(torch.arange(4) / 4)
    torch.testing.assert_close(rope.frequencies(), plain * torch.tensor([1.0, 1.0, 1.0, 0.75 + 0.25 / 4]))


def test_yarn_ends_at_the_width_where_all_pairs_turn_fast():
    """As released code has it: the last index is that of the width, of which half are pairs."""
    yarn = Yarn(factor=4.0, original_seq_len=4096, beta_fast=2000.0, beta_slow=1.0)
    rope = Rope(Model(rope_head_dim=8, rope_theta=10.0, yarn=yarn), seq_len=8192)
    plain, slowed = 10.0 ** -(torch.arange(4) / 4), torch.arange(4) / 7
    torch.testing.assert_close(rope.frequencies(), plain / 4 * slowed + plain * (1 - slowed))


def test_queries_grow_with_every_original_length_behind_them():
    yarn = Yarn(factor=4.0, original_seq_len=4, query_growth=0.1)
    rope = Rope(Model(rope_head_dim=8, yarn=yarn), seq_len=16)
    positions = torch.tensor([0, 3, 4, 11, 15])
    sizes = [1 + 0.1 * math.log(1 + blocks) for blocks in (0, 0, 1, 2, 3)]
    grown = rope.grow(torch.full((2, 5, 3), 2.0), positions)
    torch.testing.assert_close(grown, 2 * torch.tensor(sizes)[:, None].expand(2, 5, 3))
    for other in (Rope(Model(rope_head_dim=8, yarn=yarn), seq_len=4), Rope(Model(rope_head_dim=8), seq_len=16)):
        assert not other.grows and torch.equal(other.grow(grown, positions), grown)


def test_yarn_of_the_paper_scales_what_turns():
    """attention_factor on the turned parts alone, and on gradients on their way back; bounds of the ramp between pairs."""
    yarn = Yarn(factor=8.0, original_seq_len=32, truncate=False, mscale=0.0, attention_factor=1.5)
    config = Model(rope_head_dim=8, rope_theta=100.0, yarn=yarn)
    plain, long = Rope(config, seq_len=32), Rope(config, seq_len=33)
    assert long.softmax_scale == plain.softmax_scale
    table, x = long.table(33, torch.device("cpu")), torch.randn(1, 33, 2, 8)
    torch.testing.assert_close(table.abs(), torch.full((33, 4), 1.5))
    torch.testing.assert_close(plain.table(32, x.device).abs(), torch.ones(32, 4))
    torch.testing.assert_close(rotate(rotate(x, table), table.conj()), x * 1.5**2)
    bound = 8 * math.log(32 / (2 * math.pi)) / (2 * math.log(100))  # 1.413, and 2 were it rounded
    slowed = torch.tensor([0, 1 / bound, 1, 1])
    torch.testing.assert_close(long.frequencies(), plain.frequencies() * (1 - slowed * 7 / 8))


def test_embedding_sums_its_gradient_in_fp32():
    """One token 1000 times: in bf16 the sum would stop at 256."""
    embedding = Embedding(4, 2, dtype=torch.bfloat16)
    torch.nn.init.ones_(embedding.weight)
    embedding.weight.grad_dtype = torch.float32
    embedding(torch.zeros(1000, dtype=torch.int64)).sum().backward()
    assert embedding.weight.grad.tolist() == [[1000, 1000], [0, 0], [0, 0], [0, 0]]
