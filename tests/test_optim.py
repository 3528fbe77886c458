"""AdamW against torch's own, and independence of sharding."""

import pytest
import torch

from conf.schema import Optim
from train.optim import CHUNK, AdamW


def run(weights, grads, moments, steps=4):
    param = torch.nn.Parameter(weights.clone())
    optimizer = AdamW([{"params": [param], "weight_decay": 0.1}], Optim(lr=1e-2), moments)
    for grad in grads[:steps]:
        param.grad = grad.clone()
        optimizer.step()
        optimizer.updates += 1
    return param.detach()


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(1)
    size = CHUNK + 1000
    return torch.randn(size, generator=generator), [torch.randn(size, generator=generator) for _ in range(4)]


def test_fp32_moments_equal_torch(problem):
    weights, grads = problem
    reference = torch.nn.Parameter(weights.clone())
    optimizer = torch.optim.AdamW([reference], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for grad in grads:
        reference.grad = grad.clone()
        optimizer.step()
    # The two associate the bias correction differently: a few units in the last place.
    torch.testing.assert_close(run(weights, grads, torch.float32), reference.detach(), rtol=2e-6, atol=1e-6)


def test_bf16_moments_stay_close(problem):
    weights, grads = problem
    exact, rounded = run(weights, grads, torch.float32), run(weights, grads, torch.bfloat16)
    # bf16 keeps 8 bits: each update of about lr is off by at most a percent or so.
    assert (exact - rounded).abs().max() < 4 * 1e-2 * 0.05
    assert not torch.equal(exact, rounded)


def test_any_sharding_is_bit_equal(problem):
    weights, grads = problem
    whole = run(weights, grads, torch.bfloat16)
    for cut in (1, 777, CHUNK - 3):
        parts = [run(weights[s], [g[s] for g in grads], torch.bfloat16) for s in (slice(0, cut), slice(cut, None))]
        assert torch.equal(torch.cat(parts), whole)
