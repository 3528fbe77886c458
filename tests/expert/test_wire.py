import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.expert.dispatcher import from_words
from parallel.expert.wire import Fp8Wire, HighWire
from tests.expert.reference import fake_quantize

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    """Rows whose magnitudes span many powers of two."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(6 * torch.randn(count, 1, generator=generator))
    return torch.randn(count, width, generator=generator) * sizes


@DTYPES
@pytest.mark.parametrize("width", [1, 7, 128, 300])
def test_high_wire_is_the_identity(dtype, width):
    x_RD, wire = rows(5, width).to(dtype), HighWire()
    bytes_RB = wire.encode(x_RD)
    assert bytes_RB.shape == (5, wire.row_bytes(width, dtype)) and bytes_RB.shape[1] % 4 == 0
    assert torch.equal(wire.decode(bytes_RB, width, dtype), x_RD)


@DTYPES
@pytest.mark.parametrize("width", [128, 256, 300, 8])
@pytest.mark.parametrize("gradient", [False, True])
def test_fp8_wire_equals_the_papers_formula_bit_for_bit(dtype, width, gradient):
    wire = Fp8Wire()
    x_RD = rows(64, width).to(dtype) * (1e-6 if gradient else 1.0)
    bytes_RB = wire.encode(x_RD, gradient=gradient)
    assert bytes_RB.shape == (64, wire.row_bytes(width, dtype))
    decoded = wire.decode(bytes_RB, width, dtype)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, fake_quantize(x_RD, wire.gradient_floor if gradient else wire.activation_floor))
    # Twice is once: so a receiver may quantize again, and the tile's copy in bf16 is exact.
    assert torch.equal(wire.decode(wire.encode(decoded, gradient=gradient), width, dtype), decoded)
    q_RD, scale_RS = wire.decode_parts(bytes_RB, width)
    assert torch.equal(q_RD.float() * scale_RS.repeat_interleave(128, 1)[:, :width], decoded.float())


@settings(max_examples=60, deadline=None)
@given(st.integers(-30, 30), st.integers(-3, 3))
def test_scale_turns_at_448(power, ulps):
    """amax = 448 * 2^p fits scale 2^p exactly; the next number up needs 2^(p+1)."""
    bits = torch.tensor(448.0 * 2.0**power).view(torch.int32) + ulps
    wire = Fp8Wire(activation_floor=1e-12)
    _, scale = wire.decode_parts(wire.encode(bits.view(torch.float32).view(1, 1)), 1)
    assert scale.item() == 2.0 ** (power + (ulps > 0))


@pytest.mark.parametrize(("width", "size"), [(1, 4), (3, 4), (4, 8), (128, 132), (130, 132), (256, 260), (7168, 7224)])
def test_a_row_has_a_byte_for_each_value_and_each_scale_in_whole_words(width, size):
    assert Fp8Wire().row_bytes(width, torch.bfloat16) == size


def test_error_is_half_a_unit_of_three_mantissa_bits():
    x_RD = rows(256, 256)
    decoded = Fp8Wire().decode(Fp8Wire().encode(x_RD), 256, torch.float32)
    scale_RD = (
        (x_RD.view(256, 2, 128).abs().amax(2).clamp_min(1e-4) / 448).log2().ceil().exp2().repeat_interleave(128, 1)
    )
    # 2^-4 of the value where E4M3 is normal, half its smallest step 2^-9 below.
    assert ((decoded - x_RD).abs() <= torch.maximum(x_RD.abs() * 2.0**-4, scale_RD * 2.0**-10)).all()


def test_gradients_below_the_activation_floor_keep_their_range():
    grad_RD = 1e-11 * torch.randn(4, 128, generator=torch.Generator().manual_seed(3))
    wire = Fp8Wire()
    kept = wire.decode(wire.encode(grad_RD, gradient=True), 128, torch.float32)
    lost = wire.decode(wire.encode(grad_RD, gradient=False), 128, torch.float32)
    assert (kept - grad_RD).norm() < 0.05 * grad_RD.norm()
    assert not lost.any()


def test_infinities_and_nans_survive():
    x_RD = torch.ones(3, 128)
    x_RD[0, 5], x_RD[1, 6] = float("nan"), float("-inf")
    decoded = Fp8Wire().decode(Fp8Wire().encode(x_RD), 128, torch.float32)
    assert decoded[0, 5].isnan() and decoded[1, 6] == float("-inf") and torch.equal(decoded[2], x_RD[2])
    assert decoded.isfinite().sum() == 3 * 128 - 2


def test_no_rows():
    wire = Fp8Wire()
    bytes_RB = wire.encode(torch.zeros(0, 130))
    assert wire.decode(bytes_RB, 130, torch.float32).shape == (0, 130)


def test_rows_in_fp64_are_read_beside_an_odd_number_of_words():
    x_RD = torch.arange(6, dtype=torch.float64).view(3, 2)
    wire = HighWire()
    message_RB = torch.cat([wire.encode(x_RD), torch.zeros(3, 4, dtype=torch.uint8)], 1)
    assert torch.equal(wire.decode(message_RB[:, :16], 2, torch.float64), x_RD)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_values_of_two_words_beside_an_odd_number_of_words_are_read_of_any_number_of_rows(rows):
    words_MX = torch.arange(rows * 37, dtype=torch.int32).view(rows, 37)
    values = from_words(words_MX[:, 1:5], torch.float64)
    assert values.shape == (rows, 2) and torch.equal(values.view(torch.int32), words_MX[:, 1:5])
    bytes_RB = words_MX.view(torch.uint8)
    assert HighWire().decode(bytes_RB, 4, torch.float64).shape == (rows, 4)
    assert from_words(words_MX[:, 37:], torch.float64).shape == (rows, 0)  # the way back has nothing beside its rows
