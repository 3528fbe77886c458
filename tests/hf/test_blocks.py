"""FP8 blocks to fp32 and back: which bits stay the same, by the rule that train/hf/blocks.py states."""

from dataclasses import replace

import pytest
import torch

from train.hf.blocks import CAST, dequantize, requantize
from train.kernels.fp8.quantize import quantize

torch.set_num_threads(1)

SHAPES = [(128, 128), (300, 200), (1, 129), (257, 5)]


def plain(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """q * s, one block after another."""
    values = q.float()
    for row in range(scale.size(0)):
        for column in range(scale.size(1)):
            values[128 * row : 128 * row + 128, 128 * column : 128 * column + 128] *= scale[row, column]
    return values


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def random_q(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Every finite E4M3 pattern, zeros of both signs and subnormals among them; 448 and a power of two in every block."""
    bits = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    bits[(bits & 0x7F) == 0x7F] = 0x80
    bits[::128, ::128] = 0x7E
    bits[::128, 1::128] = 0x38
    return bits.view(torch.float8_e4m3fn)


def scale_like(q: torch.Tensor) -> torch.Tensor:
    return torch.empty(-(-q.size(0) // 128), -(-q.size(1) // 128))


@pytest.mark.parametrize("shape", SHAPES)
def test_new_weights_are_rounded_as_in_training(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.03
    q, scale = requantize(x)
    reference = quantize(x, CAST)
    assert same_bits(q, reference.q) and same_bits(scale, reference.scale)
    assert torch.equal(dequantize(q, scale), plain(q, scale))


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_scaled_by_their_maximum_come_back_bit_for_bit(shape):
    """DeepSeek's rule, scale = amax / 448, over many magnitudes and mantissas."""
    generator = torch.Generator().manual_seed(2)
    for exponent in range(-12, 6):
        x = torch.randn(shape, generator=generator) * 1.37 * 2.0**exponent
        first = quantize(x, CAST)
        q, scale = requantize(plain(first.q, first.scale))
        assert same_bits(q, first.q) and same_bits(scale, first.scale)


def test_any_scale_comes_back_where_the_largest_q_is_in_the_top_binade():
    """Scales that no maximum divided by 448 gives, which is one of seven, and maxima below 448."""
    generator = torch.Generator().manual_seed(3)
    beside = 0
    for top in (448.0, 416.0, 384.0, 320.0, 240.0):
        q = random_q((512, 640), generator).float().clamp(-top, top)
        q[::128, ::128] = top
        q = q.to(torch.float8_e4m3fn)
        scale = torch.rand(4, 5, generator=generator) * 1e-3 + 1e-6
        values = plain(q, scale)
        beside += (quantize(values, CAST).scale != scale).sum().item()
        again, again_scale = requantize(values)
        assert same_bits(again, q) and same_bits(again_scale, scale), top
    assert beside > 80  # else the plain rule would have done


def test_power_of_two_scales_come_back():
    x = torch.randn(384, 256, generator=torch.Generator().manual_seed(4))
    first = quantize(x, replace(CAST, pow2=True))
    q, scale = requantize(plain(first.q, first.scale))
    assert same_bits(q, first.q) and same_bits(scale, first.scale)


def test_a_power_of_two_whose_largest_q_was_rounded_to_224_is_halved():
    """The values are those of a block with half the scale and a largest q of 448, to which the same rule gives that scale."""
    cast = replace(CAST, pow2=True)
    x = torch.randn(128, 384, generator=torch.Generator().manual_seed(7)).clamp(-3, 3)
    x[0, ::128] = torch.tensor([225.0, 231.5, 233.0]) / 64
    first = quantize(x, cast)
    assert first.scale.flatten().tolist() == [1 / 64] * 3 and first.q[0, ::128].tolist() == [224, 224, 240]
    values = plain(first.q, first.scale)
    q, scale = requantize(values)
    assert torch.equal(plain(q, scale), values)
    assert scale.flatten().tolist() == [1 / 128, 1 / 128, 1 / 64]
    assert same_bits(q[:, 256:], first.q[:, 256:]) and torch.equal(q[:, :256].float(), 2 * first.q[:, :256].float())
    assert same_bits(scale, quantize(values, cast).scale)


def test_values_stay_where_the_scale_is_not_determined():
    """Blocks of small q: they move to the top binade, with a smaller scale and the same values."""
    generator = torch.Generator().manual_seed(5)
    q = (torch.randn(256, 256, generator=generator) * 0.3).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2, generator=generator) * 0.01 + 1e-4
    again, again_scale = requantize(plain(q, scale))
    assert torch.equal(plain(again, again_scale), plain(q, scale))
    assert (again_scale < scale / 32).all() and again.float().abs().max() > 224


def test_zeros_and_tiny_blocks():
    zero_q, zero_scale = requantize(torch.zeros(130, 130))
    assert not zero_q.float().any() and torch.equal(zero_scale, torch.full((2, 2), 1e-4) / 448)
    q = random_q((128, 128), torch.Generator().manual_seed(6))
    scale = scale_like(q).fill_(1e-9)  # far below the floor that new blocks get
    again, again_scale = requantize(plain(q, scale))
    assert same_bits(again, q) and same_bits(again_scale, scale)
