"""A GPU's kernels for rows on their way, in Triton's interpreter, against torch's operations; collected by test_permute.py.

In a process of its own, with TRITON_INTERPRET=1: triton reads it when it is first imported.
"""

import pytest
import torch

from bench.gpu import interpreter
from parallel.expert import triton_dispatch
from parallel.expert.permute import ExpertTargets, collect, fan_out, fan_out_of, fan_out_with_entries, hits
from parallel.expert.wire import Fp8Wire
from train.kernels.plain.plain_kernels import PlainKernels

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def rounding(monkeypatch) -> None:
    interpreter.repair(monkeypatch.setattr)


@pytest.mark.parametrize("sources, experts, top_k, wanted", [
    (5, 16, 4, ExpertTargets(0, 4, 4)), (140, 32, 6, ExpertTargets(8, 2, 4)), (1, 8, 2, ExpertTargets(0, 1, 8)), (0, 8, 2, ExpertTargets(0, 1, 8)),
    (270, 256, 8, ExpertTargets(32, 1, 32)), (150, 64, 8, ExpertTargets(0, 8, 8)), (9, 64, 8, ExpertTargets(40, 1, 3)),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
def test_a_fan_out_has_the_bits_of_the_plain_one(sources, experts, top_k, wanted, dtype):
    """More sources than a program looks at, none, one; targets without a copy; and experts of nobody here, -1."""
    order = torch.rand(sources, experts, generator=torch.Generator().manual_seed(0)).argsort(1)
    ids_SK = order[:, :top_k].to(dtype)
    ids_SK[ids_SK == 3] = -1
    copies = int(hits(ids_SK, wanted).sum())
    *ours, entry_C = triton_dispatch.place_hits(ids_SK, *wanted, copies)
    fan = fan_out_of(ids_SK, wanted, copies)
    assert all(torch.equal(one, other) for one, other in zip(ours, fan, strict=True))
    assert torch.equal(triton_dispatch.count_hits(ids_SK, *wanted).sum(0), hits(ids_SK, wanted).sum(0))
    if wanted.per_target == 1:
        assert torch.equal(entry_C, fan_out_with_entries(ids_SK, wanted, copies)[1])


@pytest.mark.parametrize("tokens, experts, top_k", [(0, 8, 2), (1, 8, 1), (150, 64, 6), (70, 256, 8)])
def test_rows_come_in_the_order_of_a_stable_sort(tokens, experts, top_k):
    """Of experts without a row, too; and their sums are those of each token's entries in their order."""
    generator = torch.Generator().manual_seed(0)
    ids_TK = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
    ours, plain = triton_dispatch.place_entries(ids_TK, experts), PlainKernels().sort_by_expert(ids_TK, experts)
    assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))
    rows_RD = torch.randn(ids_TK.numel(), 1032, generator=generator)
    places_TK, out_TD = ours[1].view(tokens, top_k), torch.empty(tokens, 1032)
    triton_dispatch.sum_entries(rows_RD, places_TK, out_TD)
    assert torch.equal(out_TD, PlainKernels().sum_entries(rows_RD, places_TK))


@pytest.mark.parametrize("sources, width", [(0, 8), (1, 8), (20, 1100)])
def test_sums_have_the_bits_of_fp32_sums_rounded_once(sources, width):
    """Of rows and into rows that are parts of wider ones; a source without a copy gets zeros."""
    generator = torch.Generator().manual_seed(1)
    hits_SN = torch.rand(sources, 5, generator=generator) < 0.5
    hits_SN[2:3] = False
    fan = fan_out(hits_SN, int(hits_SN.sum()))
    rows_CX = torch.randn(len(fan.copy_C), width + 8, generator=generator).bfloat16()[:, :width]
    wide_SX = torch.full((sources, width + 4), 7.0).bfloat16()
    triton_dispatch.collect(rows_CX, fan.copy_C, fan.start_S, wide_SX[:, :width])
    # torch sums bf16 rows on a CPU in another way; in fp32 both add in the order of the targets
    expected = collect(rows_CX.float(), fan).bfloat16()
    assert torch.equal(wide_SX[:, :width], expected) and (wide_SX[:, width:] == 7).all()


@pytest.mark.parametrize("rows, width", [(0, 128), (1, 128), (9, 256), (17, 896), (3, 7168)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_fp8_wire_has_the_bytes_of_the_plain_one(rows, width, dtype):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, width, generator=generator) * torch.exp(4 * torch.randn(rows, width, generator=generator))
    x[:1] = 0
    x[1:2, 5], x[2:3] = float("inf"), 1e-9
    wire, x = Fp8Wire(), x.to(dtype)
    for gradient, floor in ((False, wire.activation_floor), (True, wire.gradient_floor)):
        expected = wire.encode(x, gradient=gradient)
        ours = torch.full_like(expected, 255)
        triton_dispatch.encode_rows(x, ours, floor)
        assert torch.equal(ours, expected)
