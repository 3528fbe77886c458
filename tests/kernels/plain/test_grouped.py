"""Grouped GEMMs of experts on a CPU: the results equal those of each expert alone, and only a few shapes occur."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conf.thresholds import THRESHOLDS
from train.kernels.plain import grouped

ROWS = {
    "ragged": [37, 0, 1, 64, 200, 31],
    "fewer than a step": [3, 2],
    "none at the end": [40, 33, 0, 0],
    "one": [0, 0, 70],
    "none": [0, 0],
}


def _operands(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = (sum(rows), 48), (len(rows), 80, 48), (sum(rows), 80)
    x, w, dy = (torch.randn(shape, generator=draw).bfloat16() for shape in shapes)
    return x, w, dy


@pytest.mark.parametrize("name", ROWS)
def test_products_are_those_of_each_expert_alone(name):
    """Up to the rounding of results to bf16, as the order of the sums may differ."""
    rows = ROWS[name]
    x, w, dy = _operands(rows)
    pairs = list(zip(x.split(rows), w, dy.split(rows), strict=True))
    y = torch.cat([one.float() @ weight.float().t() for one, weight, _ in pairs])
    dx = torch.cat([grad.float() @ weight.float() for _, weight, grad in pairs])
    dw = torch.stack([grad.float().t() @ one.float() for one, _, grad in pairs])
    close = {"rtol": 2**-7, "atol": 1e-2}
    torch.testing.assert_close(grouped.matmul(x, w.transpose(1, 2), rows).float(), y, **close)
    torch.testing.assert_close(grouped.matmul(dy, w, rows).float(), dx, **close)
    torch.testing.assert_close(grouped.weight_gradient(dy, x, rows).float(), dw, **close)


class _Sizes(TorchDispatchMode):
    """Notes how many rows each product has."""

    def __init__(self):
        super().__init__()
        self.found: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.mm:
            self.found |= {args[0].size(0), args[0].size(1)}
        return func(*args, **(kwargs or {}))


def test_shapes_are_few():
    rows = [100 + 7 * e for e in range(16)]
    x, w, dy = _operands(rows)
    with _Sizes() as sizes:
        grouped.matmul(x, w.transpose(1, 2), rows)
        grouped.weight_gradient(dy, x, rows)
    assert {size for size in sizes.found if size > 80} <= set(
        range(THRESHOLDS.expert_rows, 256, THRESHOLDS.expert_rows)
    )


def test_without_rows_no_kernel_of_a_gpu_is_asked(monkeypatch):
    monkeypatch.delattr(grouped.F, "grouped_mm")
    x, w, dy = _operands([0, 0, 0])
    ends = torch.zeros(3, dtype=torch.int32)
    assert grouped.matmul_to_ends(x, w.transpose(1, 2), ends).shape == (0, 80)
    assert torch.equal(grouped.weight_gradient_to_ends(dy, x, ends), torch.zeros(3, 80, 48, dtype=torch.bfloat16))
