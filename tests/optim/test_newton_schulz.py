"""Singular values end in the published band, and nothing else of a matrix changes, whatever its shape, rank and size."""

import pytest
import torch

from train.optim.matrices import ITERATIONS, PUBLISHED_POLAR, SAFETY, newton_schulz_flops, orthogonalise

BANDS = {"quintic": (0.002, 0.68, 1.21), "polar_express": (0.001, 0.84, 1.13), "deepseek_v4": (0.0005, 0.999, 1.001)}
"""Where singular values end that begin, beside the norm of all, at the first number or above: of the polynomials, to two digits."""
ROUNDING = {torch.float64: 0.0, torch.float32: 1e-5, torch.bfloat16: 0.02}


def matrix(singular: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    left, right = (
        torch.linalg.qr(torch.randn(side, len(singular), dtype=torch.float64))[0] for side in (rows, columns)
    )
    return (left * singular) @ right.T


@pytest.mark.parametrize("name", ITERATIONS)
def test_the_polynomials_keep_their_band(name):
    least, low, high = BANDS[name]
    x = torch.linspace(least, 1, 100_000, dtype=torch.float64)
    for a, b, c in ITERATIONS[name]:
        x = a * x + b * x**3 + c * x**5
    assert low < x.min() and x.max() < high


def test_polar_express_takes_a_value_a_little_above_one_for_one():
    x = torch.linspace(0, 1, 9, dtype=torch.float64)
    for (a, b, c), (p, q, r) in zip(ITERATIONS["polar_express"], PUBLISHED_POLAR, strict=True):
        larger = SAFETY * x
        torch.testing.assert_close(a * larger + b * larger**3 + c * larger**5, p * x + q * x**3 + r * x**5)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)], ids=str)
@pytest.mark.parametrize("name", ITERATIONS)
def test_singular_values_end_in_the_band_and_the_directions_stay(name, shape, dtype):
    singular = torch.logspace(0, -1.5, min(shape), dtype=torch.float64)
    given = matrix(singular, *shape)
    made = orthogonalise(given.to(dtype)[None], name)[0].double()
    _, low, high = BANDS[name]
    found = torch.linalg.svdvals(made)
    assert low - ROUNDING[dtype] < found.min() and found.max() < high + ROUNDING[dtype]
    left, _, right = torch.linalg.svd(given, full_matrices=False)
    inner = left.T @ made @ right.T
    off = (inner - inner.diagonal().diag()).abs().max()
    assert (
        off < {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.3}[dtype]
    )  # steep near singular values of 0


@pytest.mark.parametrize("name", ITERATIONS)
def test_a_transposed_matrix_gives_the_transposed_factor(name):
    given = torch.randn(3, 20, 8, dtype=torch.float64)
    turned = orthogonalise(given.mT, name)
    torch.testing.assert_close(orthogonalise(given, name).mT, turned, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1.0, 1e30, 3e38])
@pytest.mark.parametrize("name", ITERATIONS)
def test_size_plays_no_part(name, size):
    given = torch.randn(2, 6, 9).clamp(-1, 1)
    big = (given.double() * size).float()
    close = 1e-4 if size > 1e-35 else 0.3  # what small numbers lost of their digits they have not any more
    torch.testing.assert_close(orthogonalise(big, name), orthogonalise(given, name), rtol=close, atol=close)


@pytest.mark.parametrize("name", ITERATIONS)
def test_rank_one_zero_and_one_row(name):
    _, low, high = BANDS[name]
    one = torch.outer(torch.randn(7, dtype=torch.float64), torch.randn(5, dtype=torch.float64))[None]
    found = torch.linalg.svdvals(orthogonalise(one, name))[0]
    assert low < found[0] < high and found[1:].max() < 1e-9
    row = orthogonalise(torch.randn(1, 1, 12, dtype=torch.float64), name)
    assert low < row.norm() < high
    batch = torch.stack([torch.zeros(4, 4), torch.eye(4)])
    made = orthogonalise(batch, name)
    assert torch.equal(made[0], torch.zeros(4, 4)) and made[1].isfinite().all()


def test_a_batch_is_its_matrices():
    given = torch.randn(4, 10, 6, dtype=torch.float64)
    alone = torch.cat([orthogonalise(one[None], "quintic") for one in given])
    torch.testing.assert_close(orthogonalise(given, "quintic"), alone, rtol=1e-12, atol=1e-14)


def test_products_are_those_of_the_smaller_side():
    assert (
        newton_schulz_flops(8, 32, "quintic")
        == newton_schulz_flops(32, 8, "quintic")
        == 5 * (4 * 8 * 8 * 32 + 2 * 8**3)
    )
