"""Rows that stay as the FP8 wire brought them: the experts' results are those of rows that were dequantised, bit for bit."""

import pytest
import torch
import torch.distributed as dist

from conf.load import compose
from parallel.expert.build import build_dispatcher
from parallel.expert.wire import Fp8RowsWire, Fp8Wire, QuantizedRows, dequantize
from tests.expert.test_dispatch import groups_of
from tests.ranks import run_ranks
from train.kernels.choice import build_kernels
from train.kernels.fp8.quantize import EagerCasts, quantize
from train.kernels.precision import build_precision

torch.set_num_threads(1)
COUNTS = torch.tensor([30, 0, 129, 41])
WIDTH, INNER = 160, 64


def precision_of(*overrides: str):
    return build_precision(compose(*overrides).precision, torch.device("cpu"), build_kernels("cpu"))


def spread_out(rows: int, seed: int) -> torch.Tensor:
    """bf16 rows of many magnitudes, whose tiles meet every case of rounding and, some of them, the floor."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(4 * torch.randn(rows, 1, generator=generator))
    return (torch.randn(rows, WIDTH, generator=generator) * sizes).bfloat16()


def received(wire: Fp8Wire, x_RD: torch.Tensor, gradient: bool = False) -> torch.Tensor:
    return wire.decode(wire.encode(x_RD, gradient=gradient), WIDTH, torch.bfloat16, gradient=gradient)


def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (len(COUNTS), 2 * INNER, WIDTH), (len(COUNTS), WIDTH, INNER)
    return [(torch.randn(shape, generator=generator) / 10).bfloat16() for shape in shapes]


def test_any_operation_gets_the_values_and_a_gather_keeps_the_form():
    x_RD = spread_out(50, 0)
    rows, values = received(Fp8RowsWire(), x_RD), received(Fp8Wire(), x_RD)
    assert isinstance(rows, QuantizedRows) and not isinstance(values, QuantizedRows)
    assert rows.shape == values.shape and rows.dtype == values.dtype
    assert torch.equal(rows.values(), values)
    for result, expected in ((rows + 1, values + 1), (rows.t() @ rows, values.t() @ values)):
        assert not isinstance(result, QuantizedRows) and torch.equal(result, expected)
    index = torch.tensor([3, 3, 49])
    gathered = rows.index_select(0, index)
    assert isinstance(gathered, QuantizedRows) and torch.equal(gathered.values(), values[index])


RECIPES = {
    "fp8": ["precision=fp8"],
    "fp8_ue8m0": ["precision=fp8_ue8m0"],
    "another cast": ["precision=fp8", "precision.fp8.dispatched=e4m3/1x128/fp32"],
    "bf16": ["precision=bf16"],
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_experts_of_any_recipe_give_the_same_bits(recipe):
    precision, rows = precision_of(*RECIPES[recipe]), int(COUNTS.sum())
    gates_R = torch.rand(rows, generator=torch.Generator().manual_seed(4)).requires_grad_()
    w13, w2 = (weight.requires_grad_() for weight in weights())

    def run(wire: Fp8Wire) -> list[torch.Tensor]:
        rows_RD = received(wire, spread_out(rows, 2)).requires_grad_()
        dy_RD = received(wire, 1e-7 * spread_out(rows, 3), gradient=True)
        y_RD = precision.expert_ffn(rows_RD, gates_R, w13, w2, COUNTS)
        return [y_RD, *torch.autograd.grad(y_RD, [rows_RD, gates_R, w13, w2], dy_RD)]

    for name, ours, expected in zip(
        ("y", "dx", "dgates", "dw13", "dw2"), run(Fp8RowsWire()), run(Fp8Wire()), strict=True
    ):
        assert expected.isfinite().all() and expected.any(), name
        assert torch.equal(ours, expected), name


def test_every_byte_is_worth_what_torch_says():
    every_RD = torch.arange(256, dtype=torch.uint8).view(2, 128).view(torch.float8_e4m3fn)
    values_RD = dequantize(every_RD, torch.tensor([[1.0], [0.25]]), torch.float32)
    torch.testing.assert_close(
        values_RD, every_RD.float() * torch.tensor([[1.0], [0.25]]), rtol=0, atol=0, equal_nan=True
    )


def test_what_arrived_is_neither_quantised_nor_dequantised_again(monkeypatch):
    """The rows are asked for their values by nobody; x and dy are cast only to tiles along the tokens, for Wgrad."""
    casts, kept, plain = [], [], EagerCasts.fake_quantize

    def fake_quantize(self, x, cast, dtype):
        casts.append((x.shape, cast.block))
        return plain(self, x, cast, dtype)

    monkeypatch.setattr(EagerCasts, "fake_quantize", fake_quantize)
    monkeypatch.setattr(
        EagerCasts, "quantize", lambda self, x, cast: kept.append((x.shape, cast.block)) or quantize(x, cast)
    )
    monkeypatch.setattr(QuantizedRows, "values", lambda self: pytest.fail("dequantised"))
    precision, rows = precision_of("precision=fp8_ue8m0", "precision.fp8.compiled=false"), int(COUNTS.sum())
    rows_RD = received(Fp8RowsWire(), spread_out(rows, 2)).requires_grad_()
    dy_RD = received(Fp8RowsWire(), spread_out(rows, 3), gradient=True)
    w13, w2 = (weight.requires_grad_() for weight in weights())
    y_RD = precision.expert_ffn(rows_RD, torch.rand(rows), w13, w2, COUNTS)
    torch.autograd.grad(y_RD, [rows_RD, w13, w2], dy_RD)
    of_rows = [block for shape, block in casts if shape[-1] == WIDTH and len(shape) == 2]
    assert of_rows == [(128, 1)] * 2
    assert {shape[-1] for shape, _ in kept} == {2 * INNER}  # what SwiGLU needs again, and none of the rows


@pytest.mark.parametrize("recipe", RECIPES)
def test_counts_that_need_no_padding(recipe):
    """Then nothing copies the rows on their way to the products."""
    precision, counts = precision_of(*RECIPES[recipe]), torch.tensor([128, 0, 0, 256])
    w13, w2 = (weight.requires_grad_() for weight in weights())
    gates_R = torch.rand(384, generator=torch.Generator().manual_seed(4))
    results = []
    for wire in (Fp8RowsWire(), Fp8Wire()):
        rows_RD = received(wire, spread_out(384, 2)).requires_grad_()
        y_RD = precision.expert_ffn(rows_RD, gates_R, w13, w2, counts)
        dy_RD = received(wire, spread_out(384, 3), gradient=True)
        results.append([y_RD, *torch.autograd.grad(y_RD, [rows_RD, w13, w2], dy_RD)])
    assert all(torch.equal(ours, expected) for ours, expected in zip(*results, strict=True))


def check_dispatch(rank: int, name: str) -> None:
    groups, precision = groups_of(1), precision_of("precision=fp8")
    generator = torch.Generator().manual_seed(rank)
    x_TD, dy_TD = spread_out(40, rank), 1e-6 * spread_out(40, 9 + rank)
    ids_TK = torch.rand(40, 8, generator=generator).topk(3, 1).indices
    gates_TK = torch.rand(40, 3, generator=generator)
    leaves = [x_TD.requires_grad_(), gates_TK.requires_grad_(), *(weight.requires_grad_() for weight in weights())]
    results = []
    for quantized in (True, False):
        dispatcher = build_dispatcher(name, experts=8, wire="fp8", quantized=quantized, **groups)
        routed = dispatcher.dispatch(x_TD, ids_TK, gates_TK)
        assert isinstance(routed.rows_RD, QuantizedRows) == quantized
        out_RD = precision.expert_ffn(routed.rows_RD, routed.gates_R, *leaves[2:], routed.counts_E)
        y_TD = dispatcher.combine(out_RD, routed)
        results.append([y_TD, *torch.autograd.grad(y_TD, leaves, dy_TD)])
    assert all(torch.equal(ours, expected) for ours, expected in zip(*results, strict=True))
    dist.barrier()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flat", "node_limited"])
def test_through_a_dispatcher_forward_and_backward(name):
    run_ranks(check_dispatch, name, world_size=2)
