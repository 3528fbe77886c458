"""Matmuls of values with fp32 scales, against fp32 matmuls of the dequantised operands, and against float64."""

import itertools

import pytest
import torch
from torch import Tensor

from conf.load import compose
from tests.kernels.fp8.test_quantize import wide
from train.kernels.choice import build_kernels
from train.kernels.cpu.cpp_build import has_avx2
from train.kernels.fp8 import fp8
from train.kernels.fp8.cast_rules import OperandRule
from train.kernels.fp8.compiled_casts import CompiledCasts, load_casts
from train.kernels.fp8.compiled_engine import CompiledEngine
from train.kernels.fp8.cpu_engine import CpuEngine
from train.kernels.fp8.engines import Source
from train.kernels.fp8.formats import E4M3, E5M2, TILE, WHOLE_SIDE, Cast
from train.kernels.fp8.fp8 import Fp8Precision, cpu_engine
from train.kernels.fp8.groups import PaddedGroups, most_tiles
from train.kernels.fp8.quantize import dequantize, quantize

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(not has_avx2(), reason="needs AVX2")

GRANULARITIES = ("1x128", "128x128", "row", "tensor")
SHAPES = [(1, 1, 1), (5, 7, 3), (150, 200, 72), (33, 129, 31), (40, 387, 70), (270, 128, 545), (300, 1000, 9)]
"""Outer, contraction, outer: smaller than every block and ragged beyond it, odd and even."""
SUM = 2**-19
"""Error of a sum beside the sum of its absolute terms: 1000 terms, each rounding 2^-24, and those do not add up in a row."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def ours() -> CompiledEngine:
    return CompiledEngine(load_casts(), build_kernels("cpu"))


def values(x: Tensor, rule: OperandRule, transposed: bool = False) -> Tensor:
    """Operand (O, C) in float64, by the reference."""
    x = dequantize(quantize(x, rule.cast(transposed)))
    return (x.mT if transposed else x).double()


def check(got: Tensor, left: Tensor, right: Tensor) -> None:
    """fp32 against left right^T in float64."""
    assert got.dtype == torch.float32
    error, size = (got.double() - left @ right.mT).abs(), left.abs() @ right.mT.abs()
    assert (error <= SUM * size).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, True), (True, False)])
def test_product_is_that_of_the_dequantised_operands(shape, transposed):
    outer, contraction, columns = shape
    engine, plain = ours(), CpuEngine()
    x, w = wide(outer, contraction).bfloat16(), wide(columns, contraction).bfloat16()
    sources = [
        (t.mT.contiguous(), True) if turned else (t, False) for t, turned in zip((x, w), transposed, strict=True)
    ]
    for kinds in itertools.product(GRANULARITIES, GRANULARITIES):
        rules = [OperandRule(E4M3, kinds[0], False, 1e-4), OperandRule(E5M2, kinds[1], False, 1e-4)]
        for left, right in (rules, rules[::-1], (rules[0], OperandRule(E4M3, kinds[1], True, 1e-4))):
            pairs = list(zip(sources, (left, right), strict=True))
            exact = [values(source, rule, turned) for (source, turned), rule in pairs]
            got = engine.matmul(*(engine.operand(t, rule, turned) for (t, turned), rule in pairs), torch.float32)
            check(got, *exact)
            reference = plain.matmul(*(plain.operand(t, rule, turned) for (t, turned), rule in pairs), torch.float32)
            assert ((got - reference).abs() <= 2 * SUM * (exact[0].abs() @ exact[1].mT.abs())).all()


def test_a_bf16_operand_counts_with_scale_one():
    engine, rule = ours(), OperandRule(E4M3, "1x128", False, 1e-4)
    x, w = normal(70, 300), normal(40, 300, seed=1)
    check(engine.matmul(engine.operand(x, rule), w, torch.float32), values(x, rule), w.double())
    operands = x, engine.operand(w, rule)
    check(engine.matmul(*operands, torch.float32), x.double(), values(w, rule))
    strided = torch.stack([w, w], -1)[..., 0]  # neither axis side by side
    assert torch.equal(engine.matmul(operands[0], engine.operand(strided, rule), torch.float32),
                       engine.matmul(*operands, torch.float32))  # fmt: skip


@pytest.mark.parametrize("kinds", [("1x128", "128x128"), ("row", "tensor"), ("128x128", "1x128"), ("tensor", "row")])
@pytest.mark.parametrize("counts", [[30, 0, 129, 128], [0, 0], [1], [257, 3, 0]], ids=str)
@pytest.mark.parametrize("pow2", [(False, False), (False, True), (True, False)])
def test_grouped_products_are_those_of_each_expert(kinds, counts, pow2):
    """Padded rows are zero; an expert without rows has a gradient of zeros."""
    engine, plain, groups = ours(), CpuEngine(), PaddedGroups(torch.tensor(counts))
    rules = [OperandRule(E4M3, kind, two, 1e-4) for kind, two in zip(kinds, pow2, strict=True)]
    rows, g = (groups.pad(normal(sum(counts), width, seed=3)) for width in (160, 97))
    weight = normal(len(counts), 97, 160, seed=4)

    def both(one: CpuEngine) -> tuple[Tensor, Tensor]:
        operands = one.operand(rows, rules[0]), one.operand(weight, rules[1])
        turned = [one.operand(t, r, transposed=True, groups=groups) for t, r in zip((g, rows), rules, strict=True)]
        y = one.grouped(*operands, groups, torch.float32)
        return y, one.grouped_wgrad(*turned, groups, torch.float32)

    for got, expected in zip(both(engine), both(plain), strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        # sums of 257 terms of size 1 at most: 2 * SUM * their absolute sum
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2 * SUM * 257)
    y, dw = both(engine)
    padding = torch.ones(groups.rows, dtype=torch.bool)
    for real in groups.real():
        padding[real] = False
    assert not y[padding].any() and not dw[torch.tensor(counts) == 0].any()


def test_dgrad_takes_the_weights_of_experts_transposed():
    engine, plain, groups = ours(), CpuEngine(), PaddedGroups(torch.tensor([150, 0, 90]))
    rule, blocks = OperandRule(E4M3, "1x128", False, 1e-12), OperandRule(E4M3, "128x128", False, 1e-4)
    dy, weight = groups.pad(normal(240, 200)), normal(3, 200, 130, seed=1)
    results = []
    for one in (engine, plain):
        right = one.operand(weight, blocks, transposed=True)
        results.append(one.grouped(one.operand(dy, rule), right, groups, torch.float32))
    torch.testing.assert_close(*results, rtol=1e-5, atol=2 * SUM * 200)


def test_output_in_bf16_is_the_sum_rounded_once():
    engine, rule = ours(), OperandRule(E4M3, "1x128", False, 1e-4)
    operands = engine.operand(normal(70, 300), rule), engine.operand(normal(45, 300, seed=1), rule)
    assert torch.equal(engine.matmul(*operands, torch.bfloat16), engine.matmul(*operands, torch.float32).bfloat16())


def test_neither_threads_nor_other_rows_change_a_bit():
    """Layouts rely on it: an expert's rows come in other numbers on other ranks."""
    engine, rule, threads = ours(), OperandRule(E4M3, "1x128", False, 1e-4), torch.get_num_threads()
    x, w = normal(700, 600), normal(580, 600, seed=1)

    def matmul(x: Tensor, w: Tensor) -> Tensor:
        return engine.matmul(engine.operand(x, rule), engine.operand(w, rule), torch.float32)

    alone = matmul(x, w)
    try:
        for torch_threads in (1, 3):
            torch.set_num_threads(torch_threads)
            assert torch.equal(matmul(x, w), alone)
            assert torch.equal(matmul(x[7:20], w[300:]), alone[7:20, 300:])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad):
    engine, plain, rule = ours(), CpuEngine(), OperandRule(E4M3, "1x128", False, 1e-4)
    x, w = normal(20, 300), normal(10, 300, seed=1)
    x[3, 200] = bad
    results = [e.matmul(e.operand(x, rule), e.operand(w, rule), torch.float32) for e in (engine, plain)]
    assert not results[0][3].isfinite().any() and not results[1][3].isfinite().any()
    rest = torch.arange(20) != 3
    torch.testing.assert_close(results[0][rest], results[1][rest], rtol=1e-5, atol=2 * SUM * 300)


def test_values_apart_from_their_scales_are_those_of_the_codes():
    casts = load_casts()
    for format, block in itertools.product(
        (E4M3, E5M2), ((1, TILE), (TILE, 1), (TILE, TILE), (1, WHOLE_SIDE), (WHOLE_SIDE, WHOLE_SIDE))
    ):
        cast = Cast(format, block, False)
        for x in (
            wide(130, 300),
            wide(130, 300).bfloat16(),
            wide(2, 129, 70),
            quantize(wide(130, 300), cast),
        ):
            source = dequantize(x) if not isinstance(x, Tensor) else x
            reference = quantize(source, cast)
            for got in (casts.split(x, cast), casts.decoded(reference)):
                assert got.q.dtype == torch.bfloat16 and got.cast == reference.cast and got.shape == reference.shape
                assert torch.equal(got.q.float(), reference.q.float()) and torch.equal(got.scale, reference.scale)
            # and what is made of them is what is made of the codes
            assert casts.decoded(got) is got
            assert torch.equal(casts.dequantize(got, torch.float32), dequantize(reference))
            other = Cast(E4M3, (TILE, 1), False)
            again, expected = casts.split(got, other), quantize(dequantize(reference), other)
            assert torch.equal(again.q.float(), expected.q.float()) and torch.equal(again.scale, expected.scale)


RECIPES = {
    "paper": [],
    "e5m2": ["gradient=e5m2/1x128/fp32"],
    "rows": ["activation=e4m3/row/fp32", "gradient=e4m3/tensor/fp32"],
    "tensors": ["activation=e4m3/tensor/fp32", "weight=e4m3/tensor/fp32"],
    "rows_of_weights": ["weight=e4m3/row/fp32", "gradient=e4m3/128x128/fp32"],
    "fp32_dispatched": ["dispatched=e4m3/1x128/fp32"],
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_layers_are_those_of_products_in_fp32(recipe):
    """Linear, output projection and experts, forward and backward, all sizes ragged."""
    shapes = ((151, 201), (73, 201), (190, 130), (3, 66, 130), (3, 130, 33))
    inputs = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    x, w, rows, w13, w2 = inputs
    gates, counts = torch.rand(190, generator=torch.Generator().manual_seed(9)), torch.tensor([62, 0, 128])
    results = []
    for compiled in ("true", "false"):
        overrides = [f"precision.fp8.{one}" for one in (*RECIPES[recipe], f"compiled={compiled}")]
        precision = Fp8Precision(
            compose("precision=fp8", *overrides).precision.fp8, torch.device("cpu"), build_kernels("cpu")
        )
        outputs = [precision.linear(x, w), precision.linear(x, w, "output")]
        outputs.append(precision.expert_ffn(rows, gates, w13, w2, counts))
        grads = [normal(*output.shape, seed=7) for output in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, inputs, grads)])
    for got, expected in zip(*results, strict=True):
        # A sum that rounds to bf16 the other way, one in thousands, may flip a rounding to FP8 of the next cast, by 2^-4
        # of a value. Wrong scales or codes would be off by 2^-6 of all.
        assert (got - expected).float().norm() <= 1e-3 * expected.float().norm()


@pytest.mark.slow
def test_it_is_chosen_where_it_can_run(monkeypatch):
    def engine(*overrides: str, meta: bool = False) -> CpuEngine:
        return cpu_engine(
            compose(f"precision={overrides[0]}", *overrides[1:]).precision.fp8, build_kernels("cpu"), meta
        )

    assert type(engine("fp8")) is type(engine("fp8", meta=True)) is CompiledEngine
    assert type(engine("fp8", "precision.fp8.compiled=false")) is CpuEngine
    monkeypatch.setattr(fp8, "has_avx2", lambda: False)
    assert type(engine("fp8")) is CpuEngine


def test_plans_allocate_what_runs_do():
    """Every tensor of a linear layer's three products and of SwiGLU, on the meta device and for real."""

    def tensors(engine: CpuEngine, device: str) -> list[tuple]:
        rule, groups = OperandRule(E4M3, "1x128", False, 1e-4), PaddedGroups(torch.tensor([30, 140]))
        x, gates = normal(groups.rows, 300).to(device), torch.rand(groups.rows).to(device)
        kept = engine.keep(x, rule.cast())
        turned = engine.operand(kept, rule, transposed=True, groups=groups)
        left, right = engine.operand(kept, rule), engine.operand(x[:70], OperandRule(E4M3, "128x128", False, 1e-4))
        made = [kept, left, right, turned, engine.cast(x, rule.cast()), engine.swiglu(x, gates, rule, rule.cast())[0]]
        made += [
            engine.matmul(left, right, torch.bfloat16),
            engine.grouped_wgrad(turned, turned, groups, torch.float32),
        ]
        return [(t.shape, t.stride(), t.dtype) for one in made for t in _parts(one)]

    assert tensors(CompiledEngine(CompiledCasts(), build_kernels("cpu")), "meta") == tensors(ours(), "cpu")


def _parts(source: Source) -> tuple[Tensor, ...]:
    return (source,) if isinstance(source, Tensor) else (source.q, source.scale)


def test_so_many_rows_take_as_many_tiles_as_there_are_experts_to_begin_one():
    """One row of an expert is a tile, and so are 128."""
    counts = [(0, 4), (1, 4), (3, 4), (5, 4), (128, 1), (129, 1), (130, 2), (258, 3)]
    assert [most_tiles(rows, experts) for rows, experts in counts] == [0, 1, 3, 4, 1, 2, 3, 4]
