"""The GPU's AdamW in Triton's interpreter, beside the compiled code and torch's kernel of a CPU.

Collected by tests/model/test_weight_gradient.py in a process of its own, with TRITON_INTERPRET=1.
"""

import pytest
import torch

from bench.gpu import interpreter
from conf.schema import Optim
from train.kernels.gpu import triton_adamw
from train.optim.adamw import AdamW, _settings

torch.set_num_threads(1)
SIZES = (3, triton_adamw.PROGRAM_ELEMENTS + 77, 0, 4096)


@pytest.fixture(autouse=True)
def rounding(monkeypatch) -> None:
    interpreter.repair(monkeypatch.setattr)


def draw(sizes: tuple[int, ...]) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """Weights with three elements of padding, and gradients of three steps, in pieces."""
    generator = torch.Generator().manual_seed(1)
    steps = [[torch.randn(size, generator=generator) for size in sizes] for _ in range(3)]
    return torch.randn(sum(sizes) + 3, generator=generator), steps


@pytest.mark.parametrize("moments", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [SIZES, (4096, 4096)], ids=["ragged", "aligned"])
def test_updates_are_those_of_the_reference(moments, sizes):
    weights, steps = draw(sizes)
    reference = torch.nn.Parameter(weights.clone())
    optimizer = AdamW([{"params": [reference], "weight_decay": 0.1}], Optim(lr=1e-2), moments, compiled=False)
    weight, mean, square = weights.clone(), *(torch.zeros_like(weights, dtype=moments) for _ in range(2))
    group = optimizer.param_groups[0]
    for count, pieces in enumerate(steps, 1):
        reference.grad = torch.cat([*pieces, torch.zeros(3)]) * (0.6 * 0.5)
        optimizer.step()
        optimizer.updates += 1
        triton_adamw.update(weight, mean, square, pieces, **_settings(group, count, 0.6 * 0.5))
    used, state = sum(sizes), optimizer.state[reference]
    # A product and a sum are one operation or two, and the factor is rounded elsewhere: units in the last place, of a moment
    # in bf16 rarely the next number.
    rtol = 2**-7 if moments == torch.bfloat16 else 2e-6
    torch.testing.assert_close(mean[:used], state["exp_avg"][:used], rtol=rtol, atol=1e-6)
    torch.testing.assert_close(square[:used], state["exp_avg_sq"][:used], rtol=rtol, atol=1e-6)
    differs = (weight - reference).abs()[:used]
    assert differs.max() <= (2e-4 if moments == torch.bfloat16 else 2e-6) and differs.median() <= 2e-7
    assert torch.equal(weight[used:], weights[used:]) and not mean[used:].any()  # padding


def test_sums_of_squares_are_those_in_fp64():
    _, (pieces, *_) = draw(SIZES)
    sums = triton_adamw.sums_of_squares(pieces)
    exact = torch.stack([piece.double().square().sum() for piece in pieces])
    torch.testing.assert_close(sums, exact, rtol=2e-7, atol=0)
    pieces[1][40] = torch.nan
    assert triton_adamw.sums_of_squares(pieces).isfinite().tolist() == [True, False, True, True]


def test_pieces_change_no_bit():
    """Wherever shards are cut, an element gets the same arithmetic."""
    results = []
    for sizes in ((5000,), (1, 4990, 9)):
        weights, (gradients, *_) = draw((5000,))
        weight, mean, square = weights.clone(), *(torch.zeros_like(weights, dtype=torch.bfloat16) for _ in range(2))
        group = {"betas": (0.9, 0.95), "lr": 1e-2, "weight_decay": 0.1, "eps": 1e-8}
        triton_adamw.update(weight, mean, square, gradients[0].split(sizes), **_settings(group, 1, None))
        results.append((weight, mean, square))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
