"""The reference of low precision, against numbers computed by hand and torch's own float8 casts."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from conf.load import compose
from tests.small import SMALL
from train.prove import low_precision as low
from train.prove.low_precision import FORMATS, LinearRules, NearNumbers, Rule
from train.prove.recipe_values import read_values

E4M3, BF16 = FORMATS["e4m3"], FORMATS["bf16"]
TILES, BLOCKS = Rule(E4M3, "1x128", False, 1e-4), Rule(E4M3, "128x128", False, 1e-4)
POWERS = replace(TILES, is_power=True)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-3, 3, shape[-1])
    return made.bfloat16().double()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2), ("bf16", torch.bfloat16), ("fp32", torch.float32)],
)
def test_rounding_is_torchs(name, dtype):
    form = FORMATS[name]
    x = torch.cat([drawn(64, 300).flatten(), torch.tensor([0.0, 2.0**-9, 2.0**-10, 3 * 2.0**-10, 1e-30]).double()])
    x = x.clamp(-form.largest, form.largest).float()
    assert torch.equal(low.nearest(x.double(), form), x.to(dtype).double())


def test_every_number_of_e4m3_stays_and_every_middle_goes_to_the_even_one():
    codes = torch.arange(0x7F, dtype=torch.uint8)  # the last is not a number
    numbers = codes.view(torch.float8_e4m3fn).double()
    assert torch.equal(low.nearest(numbers, E4M3), numbers)
    middles = (numbers[1:] + numbers[:-1]) / 2
    even = torch.where(codes[1:] % 2 == 0, numbers[1:], numbers[:-1])
    assert torch.equal(low.nearest(middles, E4M3), even)


def test_e5m6_is_the_top_of_an_fp16():
    x = drawn(32, 200).clamp(-60000, 60000)
    short = low.nearest(x, FORMATS["e5m6"]).half()
    assert (short.view(torch.int16) & 0xF == 0).all()
    assert ((short.double() - x).abs() <= torch.maximum(x.abs() * 2.0**-7, torch.tensor(2.0**-21).double())).all()


def test_a_tile_by_hand():
    """448 / 7 = 64: 7 becomes 448, 1 becomes 64, 0.01 becomes 0.64, whose neighbours in E4M3 are 0.625 and 0.6875."""
    row = torch.zeros(1, 256).double()
    row[0, :3] = torch.tensor([7.0, 1.0, 0.01])
    row[0, 128] = 1e-6  # below the floor
    made = low.cast(NearNumbers(row), TILES, -1).x[0]
    assert made[:3].tolist() == [7.0, 1.0, 0.625 / 64]
    assert made[128] == pytest.approx(4.5 * 1e-4 / 448)  # 4.48 of the scale that the floor makes, in steps of a half
    assert low.cast(NearNumbers(row), replace(TILES, floor=1e-12), -1).x[0, 128] == pytest.approx(1e-6, rel=1e-6)


def test_scales_of_powers_of_two_go_up():
    row = torch.tensor([[449.0, 1.0]]).double()
    assert low.cast(NearNumbers(row), POWERS, -1).x.tolist() == [[448.0, 1.0]]  # 224.5 in steps of 16, times 2
    row = torch.tensor([[448.0, 2.0**-9]]).double()
    assert low.cast(NearNumbers(row), POWERS, -1).x.tolist() == row.tolist()


@pytest.mark.parametrize("along", [-1, -2])
@pytest.mark.parametrize("rule", [TILES, BLOCKS, POWERS, replace(TILES, shared="row"), replace(TILES, shared="tensor")])
def test_a_cast_is_that_of_torch_tile_by_tile(rule, along):
    x = drawn(130, 150)
    made = low.cast(NearNumbers(x), rule, along).x
    rows, columns = ((side or size) for side, size in zip(rule.block(along), x.shape, strict=True))
    for top in range(0, 130, rows):
        for left in range(0, 150, columns):
            tile = x[top : top + rows, left : left + columns].float()
            amax = tile.abs().amax().clamp_min(1e-4)
            scale, inverse = amax / torch.tensor(448.0), torch.tensor(448.0) / amax
            if rule.is_power:
                scale = 2 ** torch.ceil(torch.log2(scale))
                inverse = 1 / scale
            want = (tile * inverse).to(torch.float8_e4m3fn).float() * scale
            assert torch.equal(made[top : top + rows, left : left + columns].float(), want)


def test_what_may_be_off_says_how_far_a_cast_may_move():
    """The middle of 1 and 1.125 beside 448: a hair decides, and one step is told; elsewhere nothing is."""
    row = torch.tensor([[448.0, 1.0625, 1.0]]).double()
    assert low.cast(NearNumbers(row), TILES, -1).off is None
    assert low.cast(NearNumbers(row, torch.full_like(row, 1e-6)), TILES, -1).off.tolist()[0][1:] == [0.125, 0.0]


def test_products_are_those_of_the_operands():
    x, weight, dy = drawn(140, 150), drawn(200, 150, seed=1), drawn(140, 200, seed=2)
    rules = LinearRules((TILES, BLOCKS), (TILES, BLOCKS), (TILES, TILES), TILES)
    cast_x, cast_w = low.cast(NearNumbers(x), TILES, -1).x, low.cast(NearNumbers(weight), BLOCKS, -1).x
    made = low.fprop(x, low.weight_for("fprop", weight, rules), rules)
    torch.testing.assert_close(made.x, cast_x @ cast_w.T)
    torch.testing.assert_close(made.size, cast_x.abs() @ cast_w.abs().T)
    made = low.dgrad(NearNumbers(dy), low.weight_for("dgrad", weight, rules), rules)
    torch.testing.assert_close(made.x, low.cast(NearNumbers(dy), TILES, -1).x @ cast_w)
    made = low.wgrad(NearNumbers(dy), low.kept(x, rules.kept), rules)
    left, right = low.cast(NearNumbers(dy), TILES, -2).x, low.cast(NearNumbers(cast_x), TILES, -2).x
    torch.testing.assert_close(made.x, left.T @ right)


def test_swiglu_goes_back_as_autograd_does():
    h, gates, da = drawn(5, 12).clamp(-3, 3), torch.rand(5).double(), drawn(5, 6, seed=3)
    leaf_h, leaf_gates = h.clone().requires_grad_(), gates.clone().requires_grad_()
    gate, up = leaf_h.chunk(2, -1)
    a = F.silu(gate) * up * leaf_gates[:, None]
    a.backward(da)
    back = low.swiglu_backward(NearNumbers(h), gates, NearNumbers(da), BF16)
    torch.testing.assert_close(low.swiglu(h, gates), a.detach())
    torch.testing.assert_close(back.dh.x, leaf_h.grad)
    torch.testing.assert_close(back.dgates.x, leaf_gates.grad)
    assert torch.equal(back.a.x, a.detach().bfloat16().double())


def test_tiles_along_the_rows_are_those_of_one_expert():
    x, counts = drawn(200, 8), [130, 0, 70]
    made = low.cast_rows(NearNumbers(x), counts, TILES, -2).x
    parts = [low.cast(NearNumbers(part), TILES, -2).x for part in x.split(counts)]
    assert torch.equal(made, torch.cat(parts))
    assert not torch.equal(made, low.cast(NearNumbers(x), TILES, -2).x)


def test_the_recipes_of_the_paper_are_read():
    rounding = low.read_rounding(read_values(compose(*SMALL, "data.path=none", "precision=fp8").precision))
    assert rounding.dense.fprop == (TILES, BLOCKS) and rounding.dense.kept == TILES and rounding.swiglu == TILES
    assert rounding.output.kept == Rule(FORMATS["e5m6"], "1x128", True, 1e-4)
    assert rounding.up.fprop[0] == POWERS and rounding.down.dgrad[0] == replace(POWERS, floor=1e-12)
    assert rounding.dense.wgrad == (replace(TILES, floor=1e-12), TILES) and rounding.down.kept is None
    assert not low.read_rounding(read_values(compose(*SMALL, "data.path=none", "precision=bf16").precision)).is_fp8


@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
@pytest.mark.parametrize("shared", ["1x128/fp32", "1x128/pow2", "1x32/pow2", "128x128/fp32", "row/fp32", "tensor/pow2"])
def test_every_format_that_a_recipe_may_name_has_a_reference(form, shared):
    text = f"{form}/{shared}"
    given = [f"precision.fp8.{name}={text}" for name in ("activation", "weight", "gradient")]
    precision = read_values(compose(*SMALL, "data.path=none", "precision=fp8", *given).precision)
    rule = low.read_rounding(precision).dense.fprop[0]
    assert (rule.form, rule.shared, rule.is_power) == (FORMATS[form], shared.split("/")[0], shared.endswith("pow2"))
