"""Compiled bf16 matmuls against matmuls in fp64, and when they are used."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import train.kernels.cpu.libraries as native
from train.kernels.cpu import compiled_matmuls
from train.kernels.cpu.compiled_kernels import CompiledKernels
from train.kernels.cpu.compiled_matmuls import grouped, grouped_weight_gradient, matmul
from train.kernels.plain.high import HighPrecision
from train.kernels.plain.plain_kernels import PlainKernels
from train.model.operations import Kernels

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(native.why_absent() is not None, reason=native.why_absent() or "")
SUM = 2**-19
"""Error of a sum in fp32 beside the sum of its absolute terms: 1000 terms, each rounding 2^-24, and those do not add up in a row."""
BF16 = 2**-8
"""Of a value: its rounding to bf16."""
SHAPES = [
    (1, 1, 1),
    (5, 7, 3),
    (12, 256, 32),
    (13, 257, 33),
    (150, 200, 72),
    (33, 129, 31),
    (505, 40, 513),
    (24, 900, 64),
]
"""Outer, contraction, outer: smaller than every tile and block and ragged beyond it, odd and even."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def turned(x: Tensor) -> Tensor:
    """The same values with the other axis side by side in memory."""
    return x.mT.contiguous().mT


def check(got: Tensor, left: Tensor, right: Tensor) -> None:
    """got against left right^T in fp64."""
    left, right = left.double(), right.double()
    exact, size = left @ right.mT, left.abs() @ right.mT.abs()
    rounding = BF16 * exact.abs() if got.dtype == torch.bfloat16 else 0
    assert ((got.double() - exact).abs() <= SUM * size + rounding).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_of_all_layouts_in_memory(shape, dtype):
    outer, contraction, columns = shape
    left, right = draw(outer, contraction), draw(columns, contraction, seed=1)
    strided = torch.stack([left, left], -1)[..., 0]  # neither axis side by side
    first = matmul(left, right, dtype)
    assert first.dtype == dtype and first.shape == (outer, columns)
    check(first, left, right)
    for a, b in ((turned(left), right), (left, turned(right)), (turned(left), turned(right)), (strided, right)):
        assert torch.equal(matmul(a, b, dtype), first)  # the order of sums is that of the contraction alone


def test_threads_change_no_bit():
    left, right = draw(530, 700), draw(96, 700, seed=1)
    alone = matmul(left, right, torch.float32)
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(matmul(left, right, torch.float32), alone)
    finally:
        torch.set_num_threads(1)


def test_memory_beside_a_product_is_not_touched():
    whole = torch.full((40, 100), torch.nan).bfloat16()
    left, right = whole[3:16, 20:71], draw(33, 51, seed=1)
    left.copy_(draw(13, 51))
    check(matmul(left, right, torch.float32), left, right)
    assert whole.isnan().sum() == whole.numel() - left.numel()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_its_row_alone(bad):
    left, right = draw(30, 300), draw(40, 300, seed=1)
    left[7, 211] = bad
    finite = matmul(left, right, torch.bfloat16).isfinite()
    assert not finite[7].any() and finite[:7].all() and finite[8:].all()


@pytest.mark.parametrize("rows", [[5, 0, 17, 40], [0, 0, 3], [0], [130, 1]], ids=str)
def test_experts_get_their_own_rows(rows):
    total, experts = sum(rows), len(rows)
    x, dy, weight = draw(total, 70), draw(total, 40, seed=1), draw(experts, 40, 70, seed=2)
    y, dx = grouped(x, weight, rows), grouped(dy, weight.mT, rows)
    dweight = grouped_weight_gradient(dy.t(), x.t(), rows, torch.float32)
    assert y.shape == (total, 40) and dx.shape == x.shape and dweight.shape == weight.shape
    assert dweight.dtype == torch.float32
    for one, got, mine in zip(weight, dweight, torch.arange(total).split(rows), strict=True):
        check(y[mine], x[mine], one)
        check(dx[mine], dy[mine], one.t())
        check(got, dy[mine].t(), x[mine].t())


def linear(x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    weight.grad_dtype = torch.float32
    y = CompiledKernels(matmuls=True).linear(x, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]


@pytest.mark.parametrize("batch", [(6,), (2, 3), (2, 1, 5)], ids=str)
def test_a_linear_layer_and_its_gradients(batch):
    x, weight, dy = draw(*batch, 48), draw(64, 48, seed=1), draw(*batch, 64, seed=2)
    y, dx, dweight = linear(x, weight, dy)
    assert y.shape == (*batch, 64) and dx.shape == x.shape and dweight.dtype == torch.float32
    check(y.flatten(0, -2), x.flatten(0, -2), weight)
    check(dx.flatten(0, -2), dy.flatten(0, -2), weight.t())
    check(dweight, dy.flatten(0, -2).t(), x.flatten(0, -2).t())
    broadcast = linear(x, weight, dy[(0,) * len(batch)].expand_as(dy))[2]
    check(broadcast, dy[(0,) * len(batch)].expand_as(dy).flatten(0, -2).t(), x.flatten(0, -2).t())


def test_only_wanted_gradients_are_made(monkeypatch):
    made = []
    real = compiled_matmuls.matmul
    monkeypatch.setattr(compiled_matmuls, "matmul", lambda *args: made.append(args[2]) or real(*args))
    x, weight = draw(6, 48).requires_grad_(), draw(64, 48).requires_grad_()
    weight.grad_dtype = torch.float32
    y = CompiledKernels(matmuls=True).linear(x, weight)
    torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    assert made == [torch.bfloat16] * 2  # forward, and the input's
    torch.autograd.grad(y, weight, torch.ones_like(y))
    assert made == [torch.bfloat16] * 2 + [torch.float32]


def test_meta_tensors_take_what_real_ones_take():
    def shapes(device: str) -> list[tuple]:
        results = linear(*(t.to(device) for t in (draw(2, 3, 48), draw(64, 48), draw(2, 3, 64))))
        x, dy, weight = (t.to(device) for t in (draw(22, 70), draw(22, 40), draw(2, 40, 70)))
        results += [grouped(x, weight, [9, 13]), grouped_weight_gradient(dy.t(), x.t(), [9, 13], torch.float32)]
        return [(t.shape, t.stride(), t.dtype) for t in results]

    assert shapes("meta") == shapes("cpu")


def test_they_are_taken_where_they_pay_and_may_be(monkeypatch):
    calls = []
    real = compiled_matmuls.run_matmuls
    monkeypatch.setattr(
        compiled_matmuls, "run_matmuls", lambda name, *args, **more: calls.append(name) or real(name, *args, **more)
    )
    x, weight, experts = draw(30, 48), draw(64, 48), (draw(2, 32, 48), draw(2, 48, 16))
    gates, counts = torch.ones(30), torch.tensor([10, 20])

    def use(kernels: Kernels) -> list[str]:
        calls.clear()
        high = HighPrecision(torch.bfloat16, kernels)
        high.linear(x, weight)
        kernels.matmul(x, weight, torch.float32)
        high.expert_ffn(x, gates, *experts, counts)
        return list(calls)

    assert use(CompiledKernels(matmuls=True)) == ["gemm", "gemm", "grouped_gemm", "grouped_gemm"]
    HighPrecision(torch.float32, CompiledKernels(matmuls=True)).linear(x.float(), weight.float())
    assert len(calls) == 4  # fp32 is torch's
    plain = CompiledKernels(matmuls=False)
    assert use(plain) == [] and "products" not in plain.parts
    assert torch.equal(HighPrecision(torch.bfloat16, plain).linear(x, weight), F.linear(x, weight))
    assert use(PlainKernels()) == []


def test_amx_is_left_to_torch_and_the_rate_of_bf16_is_one_of_a_cpu(monkeypatch):
    monkeypatch.delenv("SLUICE_PRODUCTS", raising=False)
    rate = native._bf16_rate
    native.compiled_matmuls_pay.cache_clear()
    try:
        pays = native.compiled_matmuls_pay()
        assert pays == (rate() < native.SLOW_SHARE and "amx_bf16" not in native.cpu_features().split())
        assert 0 <= rate() < 20
        native.compiled_matmuls_pay.cache_clear()
        monkeypatch.setattr(native, "cpu_features", lambda: "flags : amx_bf16 avx512_bf16")
        assert not native.compiled_matmuls_pay()
    finally:
        native.compiled_matmuls_pay.cache_clear()
