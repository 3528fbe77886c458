"""The CUDA path without a GPU: Triton kernels run in the interpreter, and stand-ins for matmuls check the kernels'
layouts.

Collected by test_hopper.py in a process of its own, with TRITON_INTERPRET=1: triton reads it when it is first imported.
"""

import itertools
from dataclasses import replace

import pytest
import torch

from bench.gpu import interpreter
from conf.errors import UserError
from conf.load import compose
from parallel.expert.wire import Fp8RowsWire, Fp8Wire
from tests.kernels.fp8 import fakes
from train.kernels.choice import build_kernels
from train.kernels.fp8 import hopper, hopper_probe, swiglu, triton_matmuls, triton_quantize
from train.kernels.fp8.cast_rules import OperandRule
from train.kernels.fp8.cpu_engine import CpuEngine
from train.kernels.fp8.formats import E4M3, E5M2, E5M6, Cast
from train.kernels.fp8.fp8 import Fp8Precision
from train.kernels.fp8.groups import PaddedGroups
from train.kernels.fp8.hopper import DeepGemmMatmuls, TritonMatmuls, load_deep_gemm
from train.kernels.fp8.quantize import dequantize, quantize

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def rounding(monkeypatch) -> None:
    interpreter.repair(monkeypatch.setattr)


@pytest.fixture
def engine(request) -> hopper.HopperEngine:
    """Our products in the interpreter, or where a test asks for it what DeepGEMM would be given."""
    given = getattr(request, "param", "triton")
    products = DeepGemmMatmuls(fakes.deep_gemm) if given == "deepgemm" else TritonMatmuls(triton_matmuls)
    return hopper.HopperEngine(triton_quantize, products, fakes.scaled_mm)


either_backend = pytest.mark.parametrize("engine", ["triton", "deepgemm"], indirect=True)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits."""
    return a.shape == b.shape and torch.equal(a.float(), b.float())


def wide(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(shape, generator=generator) * torch.exp(3 * torch.randn(shape, generator=generator))
    x[..., 0, :] = 0
    return x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_give_the_bits_of_the_reference(dtype):
    x = wide(256, 128).to(dtype)
    for format, pow2 in itertools.product((E4M3, E5M2), (False, True)):
        tiles = Cast(format, (1, 128), pow2)
        q, scale = triton_quantize.quantize_tiles(x, tiles)
        reference = quantize(x, tiles)
        assert same(q, reference.q) and same(scale, reference.scale) and scale.stride() == (1, 256)

        columns = Cast(format, (128, 1), pow2, 1e-12)
        for source, values in (((x, columns), x), ((q, columns, scale), dequantize(reference))):
            q_t, scale_t = triton_quantize.quantize_columns(*source)
            expected = quantize(values, columns)
            assert same(q_t, expected.q.mT) and same(scale_t, expected.scale.mT)

        blocks = Cast(format, (128, 128), pow2)
        stack = torch.stack([x, 3 * x])
        for transposed in (False, True):
            expected = quantize(stack, blocks)
            q_b, scale_b = triton_quantize.quantize_blocks(stack, blocks, transposed)
            assert same(q_b, expected.q.mT if transposed else expected.q)
            assert same(scale_b, expected.scale.mT if transposed else expected.scale)


@pytest.mark.parametrize("counts", [[3, 0, 130, 7], [128, 0, 0, 128], [0, 0, 0, 0], [0, 0, 0, 5]])
def test_rows_of_experts_are_cast_where_they_lie(counts):
    """Without padding: the bits of a reference whose rows are padded. The tiles behind the last expert's are not compared."""
    groups, rows = PaddedGroups(torch.tensor(counts)), sum(counts)
    x, ends = wide(max(rows, 1), 256)[:rows].bfloat16(), torch.tensor(counts).cumsum(0, dtype=torch.int32)
    for pow2 in (False, True):
        tiles, columns = Cast(E4M3, (1, 128), pow2), Cast(E4M3, (128, 1), not pow2, 1e-12)
        by_row = quantize(x, tiles)
        for values, given in ((x, (x, columns)), (dequantize(by_row), (by_row.q, columns, by_row.scale))):
            if len(given) == 3:
                given = *given[:2], given[2].t().contiguous().t()
            q_t, scale_t = triton_quantize.quantize_columns(*given, ends_E=ends)
            expected = quantize(groups.pad(values), columns)
            assert same(q_t[:, : groups.rows], expected.q.mT) and same(
                scale_t[:, : groups.rows // 128], expected.scale.mT
            )
        if rows:
            (q, scale), both_t = triton_quantize.quantize_both(x, tiles, columns, ends)
            assert same(q, by_row.q) and same(scale, by_row.scale)
            assert all(map(same, both_t, triton_quantize.quantize_columns(x, columns, ends_E=ends)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_that_are_no_whole_tiles_are_cast_as_if_zeros_followed(dtype):
    x = wide(130, 128).to(dtype)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 126))
    tiles, columns = Cast(E4M3, (1, 128), False), Cast(E4M3, (128, 1), True, 1e-12)
    by_row, by_column = triton_quantize.quantize_both(x, tiles, columns)
    expected, expected_t = quantize(padded, tiles), quantize(padded, columns)
    for q, scale in (by_row, triton_quantize.quantize_tiles(x, tiles)):
        assert same(q, expected.q) and same(scale, expected.scale) and scale.stride() == (1, 256)
    once = triton_quantize.quantize_tiles(x, tiles)[0][:130], by_row[1][:130].t().contiguous().t()
    expected_again = triton_quantize.quantize_columns(once[0], columns, once[1])
    assert all(map(same, triton_quantize.quantize_again(x, tiles, columns), expected_again))
    for q, scale in (by_column, triton_quantize.quantize_columns(x, columns)):
        assert same(q, expected_t.q.mT) and same(scale, expected_t.scale.mT) and scale.stride() == (1, 128)


def test_twelve_bits_are_packed_and_read_as_the_reference_says(engine):
    """Of values down to the steps below the smallest normal one, up to the largest, in whole tiles and ragged."""
    x = torch.cat([wide(128, 256), 2.0 ** torch.linspace(-30, 20, 128 * 256).view(128, 256)])
    x[5, 7], x[130, 3] = float("inf"), 3e38
    for dtype, pow2 in itertools.product((torch.bfloat16, torch.float32), (True, False)):
        cast, columns = Cast(E5M6, (1, 128), pow2), Cast(E4M3, (128, 1), False, 1e-12)
        q, scale = triton_quantize.quantize_e5m6(x.to(dtype), cast)
        reference = quantize(x.to(dtype), cast)
        assert torch.equal(q, reference.q) and torch.equal(scale, reference.scale)
        if pow2:
            rows = triton_quantize.quantize_e5m6(x[6:136].to(dtype), cast)
            values = dequantize(quantize(x[6:136].to(dtype), cast))
            assert torch.equal(triton_quantize.decode_e5m6(*rows, 130), values.bfloat16())
        finite = quantize(x[6:134].nan_to_num(posinf=0).to(dtype), cast)
        expected = quantize(dequantize(finite), columns)
        q_t, scale_t = triton_quantize.quantize_columns(finite.q, columns, finite.scale.t().contiguous().t())
        assert same(q_t, expected.q.mT) and same(scale_t, expected.scale.mT)
    kept = engine.keep(wide(130, 200).bfloat16(), Cast(E5M6, (1, 128), True))
    rule = OperandRule(E4M3, "1x128", False, 1e-4)
    values = dequantize(kept)[:130, :200]
    expected, ours = (engine.operand(source, rule, transposed=True) for source in (values, kept))
    assert same(ours.q, expected.q) and same(ours.scale, expected.scale) and ours.outer == 200


@pytest.mark.parametrize("rows", [0, 1, 128, 150])
def test_swiglu_kernels_agree_with_the_plain_form(engine, rows):
    generator = torch.Generator().manual_seed(3)
    h, da = (torch.randn(rows, width, generator=generator).bfloat16() for width in (512, 256))
    gates, cast = torch.rand(rows, generator=generator), Cast(E4M3, (1, 128), False)
    (q, scale), _ = triton_quantize.swiglu_tiles(h, gates, cast, cast)
    operand, kept = engine.swiglu(h, gates, OperandRule(E4M3, "1x128", False, cast.floor), replace(cast, pow2=True))
    assert same(operand.q, q) and same(operand.scale, scale)
    expected = quantize(h, kept.cast)
    assert kept.cast.pow2 and same(kept.q, expected.q) and same(kept.scale, expected.scale)
    plain = quantize(swiglu.forward(h, gates), cast)
    torch.testing.assert_close(scale, plain.scale, rtol=1e-6, atol=0)  # exp differs in the last bit
    assert (q.float() != plain.q.float()).sum() <= 1e-3 * q.numel()
    cached = quantize(h, cast)
    ours = triton_quantize.swiglu_backward(cached.q, gates, da, cached.scale.t().contiguous().t())
    for value, expected in zip(ours, swiglu.backward(dequantize(cached), gates, da), strict=True):
        torch.testing.assert_close(value, expected, rtol=2**-7, atol=1e-5)  # exp differs: a rounding may flip


def test_products_agree_with_the_emulation(engine):
    """Ragged sizes: the same operands, so only the order of sums differs."""
    x, w = torch.randn(130, 200, generator=torch.Generator().manual_seed(1)), wide(70, 200)
    rule, weight = OperandRule(E4M3, "1x128", False, 1e-4), OperandRule(E4M3, "128x128", True, 1e-4)
    cpu = CpuEngine()
    for right in (weight, rule):
        y = engine.matmul(engine.operand(x, rule), engine.operand(w, right), torch.float32)
        expected = cpu.matmul(cpu.operand(x, rule), cpu.operand(w, right), torch.float32)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    g = torch.randn(130, 70, generator=torch.Generator().manual_seed(2))
    kept = engine.keep(x, Cast(E4M3, (1, 128), False, 1e-4))
    dw = engine.matmul(
        engine.operand(g, rule, transposed=True), engine.operand(kept, rule, transposed=True), torch.float32
    )
    kept = cpu.keep(x, Cast(E4M3, (1, 128), False, 1e-4))
    expected = cpu.matmul(
        cpu.operand(g, rule, transposed=True), cpu.operand(kept, rule, transposed=True), torch.float32
    )
    torch.testing.assert_close(dw, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@either_backend
def test_model_products_agree_with_the_emulation(engine):
    """Forward and backward of a linear layer, the output projection and ragged experts, one of them without rows."""
    fp8 = compose("precision=fp8").precision.fp8
    ours, cpu = (Fp8Precision(fp8, torch.device("cpu"), build_kernels("cpu"), which) for which in (engine, CpuEngine()))
    generator = torch.Generator().manual_seed(5)
    x, w = torch.randn(2, 40, 192, generator=generator), torch.randn(136, 192, generator=generator) / 14
    counts = torch.tensor([3, 0, 130])
    rows, gates = torch.randn(133, 128, generator=generator), torch.rand(133, generator=generator)
    w13, w2 = torch.randn(3, 256, 128, generator=generator) / 11, torch.randn(3, 128, 128, generator=generator) / 11
    bf16 = [tensor.bfloat16().requires_grad_() for tensor in (x, w, rows, w13, w2)]
    x, w, rows, w13, w2 = bf16
    gates.requires_grad_()
    for kind in ("dense", "output"):
        _compare([precision.linear(x, w, kind) for precision in (ours, cpu)], [x, w])
    outputs = [precision.expert_ffn(rows, gates, w13, w2, counts) for precision in (ours, cpu)]
    _compare(outputs, [rows, gates, w13, w2])


@pytest.mark.parametrize("counts", [[3, 0, 130], [128, 0, 128]], ids=["padded", "whole"])
@pytest.mark.parametrize("overrides", [[], ["precision.fp8.dispatched=e4m3/1x128/fp32"]], ids=["same_cast", "another"])
def test_rows_from_an_fp8_wire_are_taken_as_they_are(engine, monkeypatch, overrides, counts):
    """Forward and backward of experts: the results of the same rows dequantised, which the kernels quantise again.

    Where the recipe asks for the wire's cast, no kernel casts the rows, in either direction.
    """
    widths, quantize_tiles = [], triton_quantize.quantize_tiles

    def counted(x: torch.Tensor, *rest) -> tuple[torch.Tensor, torch.Tensor]:
        widths.append(x.shape[1])
        return quantize_tiles(x, *rest)

    monkeypatch.setattr(triton_quantize, "quantize_tiles", counted)
    precision = Fp8Precision(
        compose("precision=fp8", *overrides).precision.fp8, torch.device("cpu"), build_kernels("cpu"), engine
    )
    rows, width, counts = sum(counts), 384, torch.tensor(counts)
    gates, w13 = torch.rand(rows), torch.randn(3, 256, width).bfloat16() / 20
    w2, results = torch.randn(3, width, 128).bfloat16() / 11, []
    for wire in (Fp8RowsWire(), Fp8Wire()):
        before = len(widths)
        bytes_RB = wire.encode(wide(rows, width))
        rows_RD = wire.decode(bytes_RB, width, torch.bfloat16)
        dy = wire.decode(bytes_RB, width, torch.bfloat16, gradient=True)
        inputs = [tensor.detach().requires_grad_() for tensor in (rows_RD, gates, w13, w2)]
        y = precision.expert_ffn(*inputs, counts)
        results.append([y, *torch.autograd.grad(y, inputs, dy)])
        taken = isinstance(wire, Fp8RowsWire) and not overrides
        assert widths[before:].count(width) == (0 if taken else 2)
    assert all(torch.equal(ours, expected) for ours, expected in zip(*results, strict=True))


def _compare(outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> None:
    """Outputs and gradients, as far as bf16 results allow: a flipped rounding in FP8 is 2^-4 of one operand."""
    grad = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(9)).bfloat16()
    results = [(output, *torch.autograd.grad(output, inputs, grad)) for output in outputs]
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype
        assert (ours.float() - expected.float()).norm() < 8e-3 * expected.float().norm()


@pytest.mark.parametrize("engine", ["deepgemm"], indirect=True)
def test_grouped_operands_of_deep_gemm_are_flat_per_expert(engine):
    groups = PaddedGroups(torch.tensor([100, 0, 130]))
    x = groups.pad(wide(230, 128).bfloat16())
    rule = OperandRule(E4M3, "1x128", False, 1e-4)
    tiles = engine.operand(x, rule, transposed=True, groups=groups)
    reference = quantize(x, rule.cast(transposed=True))
    flat = torch.cat([part.mT.flatten() for part in reference.q.float().split(groups.padded)])
    assert same(tiles.q, flat) and same(tiles.scale, reference.scale.mT)
    assert tiles.scale.t().is_contiguous()


@either_backend
def test_the_probe_finds_these_products_right(engine):
    assert hopper_probe.wrong_matmuls(engine, torch.device("cpu"), compose("precision=fp8").precision.fp8) == []


def test_what_is_missing_is_named():
    with pytest.raises(UserError, match="sgl-deep-gemm is not installed"):
        load_deep_gemm()


@pytest.mark.parametrize(
    ("name", "operand", "cure"),
    [
        ("gradient", "e5m2/1x128/fp32", "e4m3/1x128/fp32"),
        ("gradient", "e4m3/128x128/fp32", "e4m3/1x128/fp32"),
        ("activation", "e4m3/tensor/fp32", "e4m3/1x128/fp32"),
        ("weight", "e4m3/row/fp32", "e4m3/128x128/fp32"),
    ],
)
def test_an_operand_that_no_kernel_reads_is_refused_with_what_one_does(name, operand, cure):
    fp8 = compose("precision=fp8", f"precision.fp8.{name}={operand}").precision.fp8
    with pytest.raises(UserError, match=rf"precision\.fp8\.{name}") as caught:
        hopper.check_gpu_operands(fp8)
    assert f"use {cure}, or cluster.device=cpu" in caught.value.cure
