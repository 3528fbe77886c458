"""MXFP8 of Blackwell in Triton's interpreter, without a GPU; collected like interpreted.py."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu import interpreter
from conf.errors import UserError
from conf.load import compose
from parallel.expert.wire import Fp8RowsWire, Fp8Wire
from tests.kernels.fp8 import fakes
from train.kernels.choice import build_kernels
from train.kernels.fp8 import hopper, hopper_probe, swiglu, triton_quantize
from train.kernels.fp8.blackwell import BlackwellEngine, ScaledGroupedMatmuls
from train.kernels.fp8.cast_rules import OperandRule
from train.kernels.fp8.cpu_engine import CpuEngine
from train.kernels.fp8.formats import E4M3, E5M6, Cast
from train.kernels.fp8.fp8 import Fp8Precision
from train.kernels.fp8.groups import PaddedGroups
from train.kernels.fp8.quantize import dequantize, quantize

torch.set_num_threads(1)
COUNTS = {"ragged": [3, 0, 130, 1], "none": [0, 0, 0, 0], "whole": [128, 0, 0, 128], "one": [0, 0, 0, 1]}
"""Rows of experts."""
RULE, CAST = OperandRule(E4M3, "1x32", True, 1e-4), Cast(E4M3, (1, 32), True)


@pytest.fixture(autouse=True)
def rounding(monkeypatch) -> None:
    interpreter.repair(monkeypatch.setattr)


@pytest.fixture
def engine() -> BlackwellEngine:
    products = ScaledGroupedMatmuls(fakes.scaled_grouped_mm)
    return BlackwellEngine(triton_quantize, products, fakes.scaled_mm)


def wide(*shape: int) -> Tensor:
    """Values of very different size, with rows of zeros, of what rounds to zero, and of the largest that fp32 sums hold."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * torch.exp(3 * torch.randn(shape, generator=generator))
    x[..., 0, :] = 0
    x[..., 1, :] *= 2.0**-30
    x[..., 2, :] *= 2.0**40
    return x


def whole_numbers(*shape: int) -> Tensor:
    """Which E4M3 holds exactly under a power of two, and whose sums of products fp32 holds."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % 128, 0, -x.shape[-2] % 128))


def blocked(scale: Tensor) -> Tensor:
    """Scales (O, C / 32) of whole tiles as bytes in the order of memory, by views: 128 rows by 4, of these the 32 rows, 4 times, beside each other."""
    exponents = (scale.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    blocks = exponents.view(len(scale) // 128, 128, scale.shape[1] // 4, 4).permute(0, 2, 1, 3)
    return blocks.reshape(-1, 4, 32, 4).transpose(1, 2).flatten()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_casts_give_the_bits_of_the_reference(dtype):
    """As it is and transposed, ragged in both sizes, one matrix and several."""
    x = wide(130, 200).to(dtype)
    for values in (x, x.mT):
        q, scale = triton_quantize.quantize_mx(values, CAST)
        expected = quantize(padded(values), CAST)
        assert torch.equal(q.float(), expected.q.float()) and scale.shape == expected.scale.shape
        assert torch.equal(scale.view(torch.uint8).flatten(), blocked(expected.scale))
        assert torch.equal(fakes.mx_values(q, scale), dequantize(expected))
    stack = torch.stack([wide(128, 256), wide(256, 128).mT]).to(dtype)
    for values in (stack, stack.mT):
        q, scale = triton_quantize.quantize_mx(values, CAST)
        for one in range(2):
            alone = triton_quantize.quantize_mx(values[one], CAST)
            assert torch.equal(q[one].float(), alone[0].float())
            assert torch.equal(scale[one].view(torch.uint8), alone[1].view(torch.uint8).flatten())


def test_what_is_no_number_or_infinite_stays_so():
    x = wide(128, 128)
    x[5, 7], x[9, 40], x[70, 127] = torch.inf, torch.nan, 3e38
    values = fakes.mx_values(*triton_quantize.quantize_mx(x, CAST))
    assert not values[5, :32].isfinite().any() and values[5, 32:].isfinite().all()
    assert values[9, 40].isnan() and values[70].isfinite().all()
    assert torch.equal(values[70], dequantize(quantize(x, CAST))[70])


def test_what_was_kept_is_cast_again_along_the_other_side(engine):
    """Of MXFP8, of twelve bits and of tiles of 128: the cast of the values that were kept."""
    x = wide(130, 200).bfloat16()
    for cast in (CAST, Cast(E5M6, (1, 128), True), Cast(E4M3, (1, 128), True)):
        kept = engine.keep(x, cast)
        values = dequantize(quantize(padded(x), cast))[:130, :200]
        for transposed in (False, True):
            ours = engine.operand(kept, RULE, transposed)
            expected = quantize(padded(values.mT if transposed else values), CAST)
            assert torch.equal(fakes.mx_values(ours.q, ours.scale), dequantize(expected))
            assert ours.outer == (200 if transposed else 130)
        assert torch.equal(engine.values(kept), values.bfloat16())


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_scales_of_each_expert_are_a_matrix_of_their_own(engine, counts):
    groups = PaddedGroups(torch.tensor(counts), sum(counts), padded=False)
    x = wide(max(sum(counts), 3), 256)[: sum(counts)].bfloat16()
    sizes = groups.sum_ends_E.diff(prepend=torch.zeros(1)).int().tolist()
    assert min(sizes) > 0 == sum(size % 128 for size in sizes)
    split = zip(x.split(counts), sizes, strict=True)
    alone = [quantize(F.pad(part, (0, 0, 0, size - len(part))).mT, CAST) for part, size in split]
    q, scale = triton_quantize.quantize_mx(x.mT, CAST, None, groups.ends_E)
    assert torch.equal(q.float(), torch.cat([part.q.float() for part in alone], 1))
    assert torch.equal(scale.view(torch.uint8).flatten(), torch.cat([blocked(part.scale) for part in alone]))
    if sum(counts):  # of rows that were kept, whose scales lie otherwise: the cast of their values
        kept = engine.keep(x, CAST)
        values = engine.values(kept)
        ours = engine.operand(kept, RULE, transposed=True, groups=groups)
        expected, exponents = triton_quantize.quantize_mx(values.mT, CAST, None, groups.ends_E)
        assert torch.equal(ours.q.float(), expected.float())
        assert torch.equal(ours.scale.view(torch.uint8), exponents.view(torch.uint8))


@pytest.mark.parametrize("rows", [1, 130])
def test_dense_products_agree_with_the_emulation(engine, rows):
    """The same operands, so only the order of sums differs; added to a sum, and in bf16."""
    x, w, g = wide(rows + 3, 200)[3:], wide(70, 200), wide(rows + 3, 70)[3:]
    cpu, start = CpuEngine(), wide(70, 200)
    for dtype in (torch.float32, torch.bfloat16):
        y, expected = (one.matmul(one.operand(x, RULE), one.operand(w, RULE), dtype) for one in (engine, cpu))
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        assert y.dtype == dtype and y.is_contiguous()
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=1e-5 * float(expected.abs().sum()))
    for into in (None, start):
        dw, expected = (
            one.matmul(
                one.operand(g, RULE, transposed=True),
                one.operand(one.keep(x, CAST), RULE, transposed=True),
                torch.float32,
                into if into is None else into.clone(),
            )
            for one in (engine, cpu)
        )
        torch.testing.assert_close(dw, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_experts_have_the_bits_of_the_emulation_where_sums_are_exact(engine, counts):
    """Experts without rows, with one, with whole tiles; what the kernels leave unwritten reaches no result."""
    rows, weight = whole_numbers(sum(counts), 256), whole_numbers(4, 512, 256)
    grad, start = whole_numbers(sum(counts), 128), whole_numbers(4, 128, 256).float()
    made = []
    for side in (engine, CpuEngine()):
        groups = side.groups(torch.tensor(counts), len(rows))
        y = side.grouped(side.operand(groups.pad(rows), RULE), side.operand(weight, RULE), groups, torch.bfloat16)
        assert y.isfinite().all()
        back = side.grouped(
            side.operand(groups.pad(whole_numbers(sum(counts), 512)), RULE),
            side.operand(weight, RULE, transposed=True),
            groups,
            torch.bfloat16,
        )
        left, right = (side.operand(groups.pad(x), RULE, transposed=True, groups=groups) for x in (grad, rows))
        sums = [side.grouped_wgrad(left, right, groups, torch.float32, into) for into in (None, start.clone())]
        made.append((groups.unpad(y), groups.unpad(back), sums[0].bfloat16(), (sums[1] - start).bfloat16()))
    assert all(torch.equal(ours, expected) for ours, expected in zip(*made, strict=True))


@pytest.mark.parametrize("rows", [1, 150])
def test_swiglu_is_cast_from_fp32(engine, rows):
    generator = torch.Generator().manual_seed(3)
    h, gates = torch.randn(rows, 512, generator=generator).bfloat16(), torch.rand(rows, generator=generator)
    made, kept = engine.swiglu(h, gates, RULE, Cast(E4M3, (1, 128), True))
    plain = dequantize(quantize(padded(swiglu.forward(h, gates)), CAST))
    values = fakes.mx_values(made.q, made.scale)
    assert (values != plain).sum() <= 1e-3 * plain.numel()  # exp differs in the last bit
    assert kept.cast.block == (1, 128) and made.outer == rows


def test_a_layer_agrees_with_the_emulation(engine):
    """Forward and backward of a linear layer, the output projection and ragged experts, one of them without rows."""
    fp8 = compose("precision=mxfp8").precision.fp8
    sides = [Fp8Precision(fp8, torch.device("cpu"), build_kernels("cpu"), which) for which in (engine, CpuEngine())]
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, w = normal(2, 40, 192), normal(136, 192) / 14
    rows, w13, w2 = normal(133, 128), normal(3, 256, 128) / 11, normal(3, 128, 128) / 11
    x, w, rows, w13, w2 = (tensor.bfloat16().requires_grad_() for tensor in (x, w, rows, w13, w2))
    gates, counts = torch.rand(133, generator=generator).requires_grad_(), torch.tensor([3, 0, 130])
    for kind in ("dense", "output"):
        compare([side.linear(x, w, kind) for side in sides], [x, w])
    compare([side.expert_ffn(rows, gates, w13, w2, counts) for side in sides], [rows, gates, w13, w2])


def compare(outputs: list[Tensor], inputs: list[Tensor]) -> None:
    """As far as bf16 results allow: a flipped rounding in FP8 is 2^-4 of one operand."""
    grad = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(9)).bfloat16()
    results = [(output, *torch.autograd.grad(output, inputs, grad)) for output in outputs]
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype
        assert (ours.float() - expected.float()).norm() < 8e-3 * expected.float().norm()


def test_rows_from_an_fp8_wire_are_cast_again(engine):
    """Their scales are those of 128 values: what comes is the rows dequantised."""
    precision = Fp8Precision(
        compose("precision=mxfp8").precision.fp8, torch.device("cpu"), build_kernels("cpu"), engine
    )
    counts, results = torch.tensor([3, 0, 130]), []
    gates, w13, w2 = torch.rand(133), torch.randn(3, 256, 384).bfloat16() / 20, torch.randn(3, 384, 128).bfloat16() / 11
    for wire in (Fp8RowsWire(), Fp8Wire()):
        sent = wire.encode(whole_numbers(133, 384))
        rows, dy = (wire.decode(sent, 384, torch.bfloat16, gradient=gradient) for gradient in (False, True))
        inputs = [tensor.detach().requires_grad_() for tensor in (rows, gates, w13, w2)]
        y = precision.expert_ffn(*inputs, counts)
        results.append([y, *torch.autograd.grad(y, inputs, dy)])
    assert all(torch.equal(ours, expected) for ours, expected in zip(*results, strict=True))


def test_the_probe_finds_these_products_right_and_scales_in_another_order_wrong(engine, monkeypatch):
    fp8 = compose("precision=mxfp8").precision.fp8
    assert hopper_probe.wrong_matmuls(engine, torch.device("cpu"), fp8) == []
    quantize_mx = triton_quantize.quantize_mx

    def plain(*given, **named) -> tuple[Tensor, Tensor]:
        q, scale = quantize_mx(*given, **named)
        return q, scale.view(torch.uint8).flip(-1).view(scale.dtype)

    monkeypatch.setattr(triton_quantize, "quantize_mx", plain)
    wrong = hopper_probe.wrong_matmuls(engine, torch.device("cpu"), fp8)
    assert len(wrong) == 6 and "scaled_mm, 1x32 by 1x32 is off by" in wrong[0][0]


@pytest.mark.parametrize(("rows", "columns", "size"), [(128, 192, 192), (200, 128, 200)])
def test_experts_that_are_no_whole_tiles_are_refused(engine, rows, columns, size):
    for transposed in (False, True):
        with pytest.raises(UserError, match="must be a multiple of 128 for FP8 experts") as caught:
            engine.operand(wide(2, rows, columns), RULE, transposed)
        assert caught.value.value == size


def test_other_tiles_beside_those_of_32_are_refused():
    hopper.check_gpu_operands(compose("precision=mxfp8").precision.fp8)
    for words, field in (
        (["precision.fp8.weight=e4m3/128x128/pow2"], "weight"),
        (["precision.fp8.gradient=e5m2/1x32/pow2"], "gradient"),
        (["precision.fp8.backend=deepgemm"], "backend"),
    ):
        with pytest.raises(UserError, match=field) as caught:
            hopper.check_gpu_operands(compose("precision=mxfp8", *words).precision.fp8)
        assert "1x128" not in caught.value.cure
