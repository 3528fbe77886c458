"""FP8 matmuls in Triton's interpreter against the emulation on the CPU; collected like interpreted.py."""

import pytest
import torch
from torch import Tensor

from bench.gpu import interpreter
from conf.thresholds import lowered
from tests.kernels.fp8 import fakes
from train.kernels.fp8 import hopper, triton_matmuls, triton_quantize
from train.kernels.fp8.cast_rules import OperandRule
from train.kernels.fp8.cpu_engine import CpuEngine
from train.kernels.fp8.formats import E4M3, TILE
from train.kernels.fp8.hopper import TritonMatmuls

torch.set_num_threads(1)
COUNTS = {"ragged": [3, 0, 130, 1], "none": [0, 0, 0, 0], "whole": [128, 0, 0, 128], "last": [0, 0, 0, 5]}
"""Rows of experts."""


@pytest.fixture(autouse=True)
def rounding(monkeypatch) -> None:
    interpreter.repair(monkeypatch.setattr)


@pytest.fixture
def engine() -> hopper.HopperEngine:
    return hopper.HopperEngine(triton_quantize, TritonMatmuls(triton_matmuls), fakes.scaled_mm)


def whole_numbers(*shape: int) -> Tensor:
    """Which E4M3 holds exactly under a scale that is a power of two, and whose sums of products fp32 holds."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def rules(pow2: bool) -> tuple[OperandRule, OperandRule]:
    """Of tiles and of blocks."""
    return OperandRule(E4M3, "1x128", pow2, 1e-4), OperandRule(E4M3, "128x128", pow2, 1e-4)


def forward(side, rows: Tensor, weight: Tensor, counts: list[int], pow2: bool, dtype: torch.dtype) -> Tensor:
    groups, (tiles, blocks) = side.groups(torch.tensor(counts), len(rows)), rules(pow2)
    left, right = side.operand(groups.pad(rows), tiles), side.operand(weight, blocks)
    made = side.grouped(left, right, groups, dtype)
    if isinstance(side, hopper.HopperEngine):
        with lowered():  # a program takes two tiles then: the same numbers in the same order
            assert torch.equal(side.grouped(left, right, groups, dtype), made)
    return groups.unpad(made)


def backward(side, grad: Tensor, rows: Tensor, counts: list[int], pow2: bool, into: Tensor | None = None) -> Tensor:
    groups, (tiles, _) = side.groups(torch.tensor(counts), len(rows)), rules(pow2)
    left, right = (side.operand(groups.pad(x), tiles, transposed=True, groups=groups) for x in (grad, rows))
    return side.grouped_wgrad(left, right, groups, torch.float32, into)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_experts_have_the_bits_of_the_emulation_where_sums_are_exact(engine, counts):
    """Experts without rows, with one, with whole tiles, and rows behind the last expert's, which are nobody's."""
    rows, weight, cpu = whole_numbers(sum(counts), 256), whole_numbers(4, 512, 256), CpuEngine()
    grad, start = whole_numbers(sum(counts), 128), whole_numbers(4, 128, 256).float()
    assert torch.equal(*(forward(side, rows, weight, counts, True, torch.bfloat16) for side in (engine, cpu)))
    assert torch.equal(*(backward(side, grad, rows, counts, True) for side in (engine, cpu)))
    sums = [start.clone(), start.clone()]
    made = [backward(side, grad, rows, counts, True, into) for side, into in zip((engine, cpu), sums, strict=True)]
    assert torch.equal(*made) and all(one is into for one, into in zip(made, sums, strict=True))
    idle = [expert for expert, count in enumerate(counts) if count == 0]
    assert torch.equal(made[0][idle], start[idle])


@pytest.mark.parametrize("tokens", [1, 130])
def test_a_dense_gradient_has_the_bits_of_the_emulation_where_sums_are_exact(engine, tokens):
    """Sizes that are no whole tiles."""
    grad, x, start, made = whole_numbers(tokens, 70), whole_numbers(tokens, 200), whole_numbers(70, 200), []
    for side in (engine, CpuEngine()):
        a, b = (side.operand(t, rules(True)[0], transposed=True) for t in (grad, x))
        made.append(side.matmul(a, b, torch.float32, start.float()))
    assert torch.equal(*made)


def test_experts_follow_the_emulation_as_far_as_fp32_sums_do(engine):
    """The same operands: either sum of C products is off by C roundings of 2^-24 at most, of the sum of their sizes. Sums so near
    may round to neighbours in bf16, which are 2^-7 of the smaller one apart at most: where they do hangs on the processor.
    """
    counts, generator, cpu = COUNTS["ragged"], torch.Generator().manual_seed(3), CpuEngine()
    rows, grad, weight = (torch.randn(shape, generator=generator) for shape in ((134, 384), (134, 128), (4, 256, 384)))
    rows *= torch.exp(20 * torch.randn(134, 1, generator=generator))
    sizes = forward(cpu, rows.abs(), weight.abs(), counts, False, torch.float32)
    ours, expected = (forward(side, rows, weight, counts, False, torch.bfloat16).float() for side in (engine, cpu))
    assert ((ours - expected).abs() <= 2 * (384 + 4) * 2**-24 * sizes + 2**-7 * expected.abs()).all()
    sizes = backward(cpu, grad.abs(), rows.abs(), counts, False)
    ours, expected = (backward(side, grad, rows, counts, False) for side in (engine, cpu))
    assert ((ours - expected).abs() <= 2 * (max(counts) + 4) * 2**-24 * sizes).all()


def test_sums_are_scaled_and_added_in_fp32_every_128():
    """Paper 3.3.2, bit by bit: the sum of 128 is exact here, its product with the scales and the sum of such are rounded."""
    left, right = (whole_numbers(128, 384).to(E4M3.dtype) for _ in range(2))
    scales = [torch.rand(3, 128, generator=torch.Generator().manual_seed(seed)).t() for seed in (1, 2)]
    blocks, added = torch.rand(1, 1, 3, generator=torch.Generator().manual_seed(4)), torch.rand(1, 128, 128)
    of_blocks, of_tiles = torch.zeros(128, 128), torch.zeros(128, 128)
    for tile in range(3):
        part = slice(tile * TILE, (tile + 1) * TILE)
        matmul = left[:, part].float() @ right[:, part].float().t()
        of_blocks += matmul * (scales[0][:, tile, None] * blocks[0, 0, tile])
        of_tiles += matmul * (scales[0][:, tile, None] * scales[1][None, :, tile])
    out = torch.empty(128, 128)
    assert torch.equal(triton_matmuls.matmul(left, scales[0], right[None], blocks, out), of_blocks)
    ours = triton_matmuls.wgrad(left, scales[0], right, scales[1], added.clone(), added=True)
    assert torch.equal(ours[0], of_tiles + added[0])


def test_the_host_need_not_know_how_many_rows_an_expert_has(engine):
    """Rows stay as they are, without padding."""
    groups = engine.groups(torch.tensor([3, 0, 130]), 133)
    assert groups.rows == 133 and groups.slots_R is None
    assert groups.ends_E.tolist() == [3, 3, 133] and groups.ends_E.dtype == torch.int32
    assert "counts" not in vars(groups)
