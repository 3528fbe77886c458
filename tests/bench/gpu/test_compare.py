"""Two sides agree if they differ only by rounding. They disagree if a value is wrong, not a number, or missing."""

import pytest
import torch

from bench.gpu.compare import distances, judge, relative, seeded, with_gradients


def sides(change) -> list[dict[str, torch.Tensor]]:
    exact = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    same = exact.bfloat16()
    return [{"x": change(same.float().clone())}, {"x": same}, {"x": exact}]


@pytest.mark.slow
def test_what_rounds_as_much_as_the_format_passes():
    noise = 2**-9 * torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    found = judge(distances(*sides(lambda x: x * (1 + noise))))
    assert found.problem is None and 0 < found.figures["worst, of what is allowed"] < 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x * 1.05,
        lambda x: x.roll(1, 0),
        lambda x: x.index_fill(0, torch.tensor([3]), 0),
        lambda x: x * torch.nan,
    ],
    ids=["scaled", "rows moved", "a row of zeros", "not a number"],
)
def test_what_is_wrong_fails_and_is_named(wrong):
    found = judge(distances(*sides(wrong)))
    assert found.problem is not None and "first x" in found.problem


def test_a_missing_tensor_or_another_shape_is_an_error():
    device, same, exact = sides(lambda x: x)
    with pytest.raises(ValueError, match="y"):
        distances(device | {"y": same["x"]}, same, exact)
    with pytest.raises(ValueError, match="shapes"):
        relative(same["x"][0], same["x"])
    assert relative(torch.zeros(3), torch.zeros(3)) == 0


def test_a_single_number_that_one_format_gets_right_by_chance_allows_for_a_rounding():
    one = {"loss": torch.tensor(8.0)}
    assert judge(distances({"loss": torch.tensor(8.004)}, one, one)).problem is None
    assert judge(distances({"loss": torch.tensor(8.01)}, one, one)).problem is not None


def test_both_formats_start_from_equal_values():
    draws = [seeded(3, torch.device("cpu"), dtype)(8, 8) for dtype in (torch.bfloat16, torch.float32)]
    assert torch.equal(draws[0].float(), draws[1])
    draw = seeded(3, torch.device("cpu"), torch.float32)
    x = draw(4, 4)
    found = with_gradients({"y": 2 * x}, {"x": x}, draw)
    assert set(found) == {"y", "d x"} and found["d x"].abs().sum() > 0
