"""The quantiser against its definition, and the FP8 dispatch format against the quantiser."""

import pytest
import torch

from parallel.expert.wire import Fp8Wire
from train.kernels.fp8.formats import E4M3, E5M2, E5M6, WHOLE_SIDE, Cast, pack_e5m6, unpack_e5m6
from train.kernels.fp8.quantize import EagerCasts, dequantize, quantize, scales

torch.set_num_threads(1)
FAKE = EagerCasts().fake_quantize
BLOCKS = ((1, 128), (128, 1), (128, 128), (1, WHOLE_SIDE), (WHOLE_SIDE, WHOLE_SIDE))


def wide(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values over many orders of magnitude, with a row of zeros."""
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    x = torch.randn(shape, generator=generator) * torch.exp(3 * torch.randn(shape, generator=generator))
    x[..., :1, :] = 0
    return x.to(dtype)


@pytest.mark.parametrize("format", [E4M3, E5M2, E5M6], ids=lambda format: format.name)
def test_reference_rounds_to_the_nearest_value_ties_to_even(format):
    """Against a search among all finite values of the format, in fp64."""
    if format is E5M6:
        codes = (torch.arange(4096, dtype=torch.int16) << 4).view(torch.float16)
    else:
        codes = torch.arange(256, dtype=torch.uint8).view(format.dtype)
    grid = codes.double()
    grid = grid[grid.isfinite() & (grid >= 0) & ~torch.signbit(grid)]  # ascending, so an even index is an even mantissa
    assert grid.max() == format.max
    x = wide(4, 512)
    x[1, ::2] = (grid[torch.arange(256) % (len(grid) - 1)] + grid[torch.arange(256) % (len(grid) - 1) + 1]).float() / 2
    x[1, 0] = format.max  # the scale is 1, so the midpoints above are ties
    quantized = quantize(x, Cast(format, (1, WHOLE_SIDE), False))
    _, inverse = scales(x.abs().amax(1, keepdim=True), quantized.cast)
    scaled = (x * inverse).abs().double()
    above = torch.searchsorted(grid, scaled).clamp_max(len(grid) - 1)
    below = (above - 1).clamp_min(0)
    low, high = scaled - grid[below], grid[above] - scaled
    index = torch.where((low < high) | ((low == high) & (below % 2 == 0)), below, above)
    index = torch.where(scaled >= format.max, len(grid) - 1, index)
    q = unpack_e5m6(quantized.q, 512) if format is E5M6 else quantized.q
    assert torch.equal(q.double(), grid[index] * torch.sign(x))


def test_power_of_two_scales_are_the_smallest_that_fit_and_quantising_again_changes_nothing():
    x = wide(64, 256)
    amax = torch.cat([x.abs().amax(1), torch.tensor([448.0, 448.0 * (1 + 2**-22), 1e30, 0.0, 224.0])])
    scale, inverse = scales(amax, Cast(E4M3, (1, 128), True))
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    amax = amax.clamp_min(1e-4).double()
    assert ((amax <= 448 * scale.double()) & (amax > 224 * scale.double())).all()
    assert torch.equal(scale * inverse, torch.ones_like(scale))
    for format in (E4M3, E5M2, E5M6):
        once = FAKE(x, Cast(format, (1, 128), True), torch.float32)
        assert torch.equal(FAKE(once, Cast(format, (1, 128), True), torch.float32), once)
        # 1x128 to 128x1 shifts exponents only: what changes lies under the smallest normal value of its new tile
        again = FAKE(once, Cast(format, (128, 1), True), torch.float32)
        tile = scales(once.abs().amax(0, keepdim=True), Cast(format, (128, 1), True))[0]
        assert ((again - once).abs() <= tile * 2.0 ** (format.min_exponent - format.mantissa)).all()


def test_e5m6_packs_two_values_in_three_bytes():
    values = (torch.arange(4096, dtype=torch.int16) << 4).view(torch.float16)
    values = values[values.isfinite()].float()
    packed = pack_e5m6(values)
    assert packed.numel() * 2 == values.numel() * 3
    assert torch.equal(unpack_e5m6(packed, values.numel()).float(), values)
    stream = int.from_bytes(packed[:12].numpy().tobytes(), "little")  # value i stands at bit 12 i
    assert [stream >> 12 * i & 0xFFF for i in range(8)] == list(range(8))
    assert unpack_e5m6(pack_e5m6(values[:7]), 7).shape == (7,)


@pytest.mark.parametrize("pow2", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(pow2, bad):
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(2, 256, dtype=dtype)
        x[0, 3] = bad
        cast = Cast(E4M3, (1, 128), pow2)
        values = dequantize(quantize(x, cast))
        assert not values[0, 3].isfinite()
        assert torch.equal(values[1], torch.ones(256)) and torch.equal(values[0, 128:], torch.ones(128))


@pytest.mark.parametrize("gradient", [False, True])
def test_the_wire_and_the_quantiser_agree_in_every_bit(gradient):
    """So a row that came in FP8 enters the product as it came."""
    wire = Fp8Wire()
    x = wide(65, 320, dtype=torch.bfloat16) * (1e-6 if gradient else 1)
    q, scale = wire.decode_parts(wire.encode(x, gradient=gradient), 320)
    cast = Cast(E4M3, (1, 128), True, wire.gradient_floor if gradient else wire.activation_floor)
    ours = quantize(x, cast)
    assert torch.equal(ours.q.view(torch.uint8), q.view(torch.uint8)) and torch.equal(ours.scale, scale)
    arrived = wire.decode(wire.encode(x, gradient=gradient), 320, torch.bfloat16)
    assert torch.equal(FAKE(arrived, cast, torch.bfloat16), arrived)
