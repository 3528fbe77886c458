from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.expert.permute import collect, fan_out, sort_entries, spread
from tests.interpret import needs_triton, run_interpreted

SIZES = st.tuples(st.integers(0, 9), st.integers(1, 6), st.integers(0, 2**31))


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_fan_out_spreads_by_target_and_collects_by_source(sizes):
    sources, targets, seed = sizes
    generator = torch.Generator().manual_seed(seed)
    hits_SN = torch.rand(sources, targets, generator=generator) < 0.4
    rows_SX = torch.randn(sources, 3, generator=generator)
    fan = fan_out(hits_SN, int(hits_SN.sum()))
    copies = [rows_SX[source] for target in range(targets) for source in range(sources) if hits_SN[source, target]]
    expected = torch.stack(copies) if copies else rows_SX.new_zeros(0, 3)
    assert torch.equal(spread(rows_SX, fan), expected)
    # The sum of equal copies is exact for these small counts up to rounding of the last bit.
    torch.testing.assert_close(collect(expected, fan), rows_SX * hits_SN.sum(1, keepdim=True), rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_sort_entries_is_stable_and_its_inverse_restores_order(sizes):
    sources, entries, seed = sizes
    target_SK = torch.randint(0, 5, (sources, entries), generator=torch.Generator().manual_seed(seed))
    fan = sort_entries(target_SK)
    order = sorted(range(sources * entries), key=lambda c: int(target_SK.flatten()[c]))
    assert fan.source_C.tolist() == [c // entries for c in order]
    assert [order[place] for place in fan.copy_C.tolist()] == list(range(sources * entries))


def test_spread_and_collect_are_transposes():
    hits_SN = torch.rand(40, 7, generator=torch.Generator().manual_seed(1)) < 0.3
    fan = fan_out(hits_SN, int(hits_SN.sum()))
    x_SX = torch.randn(40, 5, dtype=torch.float64)
    y_CX = torch.randn(fan.source_C.numel(), 5, dtype=torch.float64)
    left, right = (spread(x_SX, fan) * y_CX).sum(), (x_SX * collect(y_CX, fan)).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_collect_of_bf16_rounds_once():
    rows_CX = torch.randn(8, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    fan = sort_entries(torch.zeros(1, 8, dtype=torch.int64))
    exact = rows_CX.double().sum(0, keepdim=True)
    # Half a unit in the last of bf16's 8 bits, where a bf16 running sum errs several times as much.
    assert ((collect(rows_CX, fan).double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-6).all()


@pytest.mark.slow
@needs_triton
def test_kernels_of_a_gpu_in_the_interpreter():
    run_interpreted(Path(__file__).parent, ["interpreted"])
