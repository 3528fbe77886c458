"""The matmul that computes the gradient of experts' weights on a GPU, in Triton's interpreter.

Collected by tests/model/test_weight_gradient.py in a process of its own, with TRITON_INTERPRET=1.
"""

import pytest
import torch

from bench.gpu import interpreter
from train.kernels.gpu.triton_grouped import grouped_weight_gradient

torch.set_num_threads(1)


@pytest.mark.parametrize("rows", [[13, 0, 127, 1], [0, 0], [64, 130]], ids=str)
@pytest.mark.parametrize("sizes", [(40, 70), (130, 257)], ids=str)
def test_it_adds_the_product_of_each_experts_rows(rows, sizes, monkeypatch):
    interpreter.repair(monkeypatch.setattr)
    torch.manual_seed(0)
    total, (outputs, inputs) = sum(rows) + 5, sizes  # the last rows are nobody's
    grad, x = torch.randn(total, outputs).bfloat16(), torch.randn(total, inputs).bfloat16()
    ends = torch.tensor(rows).cumsum(0).to(torch.int32)
    parts = zip(grad[: sum(rows)].double().split(rows), x[: sum(rows)].double().split(rows), strict=True)
    exact = torch.stack([one.t() @ other for one, other in parts])
    before = torch.randn(len(rows), outputs, inputs)
    made = grouped_weight_gradient(grad, x, ends, None)
    assert made.dtype == torch.float32
    # Sums in fp32 of at most 130 terms of size 1.
    torch.testing.assert_close(made, exact.float(), rtol=1e-5, atol=1e-5)
    into = before.clone()
    assert grouped_weight_gradient(grad, x, ends, into) is into
    torch.testing.assert_close(into, (before.double() + exact).float(), rtol=1e-5, atol=1e-5)
