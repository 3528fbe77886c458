"""AdamW against torch's own and against its formula in plain operations, and independence of sharding."""

import pytest
import torch

import train.kernels.cpu.libraries as native
from conf.schema import Optim
from conf.thresholds import THRESHOLDS
from train.optim.adamw import AdamW

SIZE = 2 * THRESHOLDS.adamw_elements + 1003
"""Whole chunks, a part of one, and elements that fill no vector."""


@pytest.fixture(params=["compiled", "torch"])
def build(request):
    """Makes optimizers whose updates with bf16 moments are compiled code, or torch's kernel."""
    if request.param == "compiled" and native.why_absent() is not None:
        pytest.skip(native.why_absent())

    def optimizer(param, moments):
        group = {"params": [param], "weight_decay": 0.1}
        return AdamW([group], Optim(lr=1e-2), moments, request.param == "compiled")

    return optimizer


def run(build, weights, grads, moments, steps=4):
    param = torch.nn.Parameter(weights.clone())
    optimizer = build(param, moments)
    for grad in grads[:steps]:
        param.grad = grad.clone()
        optimizer.step()
        optimizer.updates += 1
    return param.detach()


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SIZE, generator=generator), [torch.randn(SIZE, generator=generator) for _ in range(4)]


def plain_update(weight, grad, exp_avg, exp_avg_sq, lr, count):
    """The same in one operation after the other."""
    mean, square = exp_avg.float(), exp_avg_sq.float()
    mean.lerp_(grad, 1 - 0.9)
    square.mul_(0.95).addcmul_(grad, grad, value=1 - 0.95)
    exp_avg.copy_(mean)
    exp_avg_sq.copy_(square)
    weight.mul_(1 - lr * 0.1)
    scale = (square / (1 - 0.95**count)).sqrt_().add_(1e-8)
    weight.addcdiv_(mean, scale, value=-lr / (1 - 0.9**count))


@pytest.mark.parametrize("moments", [torch.bfloat16, torch.float32])
def test_one_pass_equals_plain_operations(build, problem, moments):
    weights, grads = problem
    param = torch.nn.Parameter(weights.clone())
    optimizer = build(param, moments)
    expected, exp_avg, exp_avg_sq = weights.clone(), *(torch.zeros(SIZE, dtype=moments) for _ in range(2))
    for count, grad in enumerate(grads, 1):
        param.grad = grad.clone()
        optimizer.step()
        optimizer.updates += 1
        plain_update(expected, grad, exp_avg, exp_avg_sq, 1e-2, count)
    # The kernel divides by the root of the bias correction, not by the correction inside the root: it rounds elsewhere.
    torch.testing.assert_close(param.detach(), expected, rtol=2e-6, atol=1e-6)
    # Of the moments only a product and sum may be one operation or two: an ulp, in bf16 rarely the next number.
    rtol = 2**-7 if moments == torch.bfloat16 else 1e-6
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        torch.testing.assert_close(optimizer.state[param][name], moment, rtol=rtol, atol=1e-7)


def test_fp32_moments_equal_torch(build, problem):
    weights, grads = problem
    reference = torch.nn.Parameter(weights.clone())
    optimizer = torch.optim.AdamW([reference], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for grad in grads:
        reference.grad = grad.clone()
        optimizer.step()
    # The two associate the bias correction differently: a few units in the last place.
    torch.testing.assert_close(run(build, weights, grads, torch.float32), reference.detach(), rtol=2e-6, atol=1e-6)


def test_bf16_moments_stay_close(build, problem):
    weights, grads = problem
    exact, rounded = run(build, weights, grads, torch.float32), run(build, weights, grads, torch.bfloat16)
    # bf16 keeps 8 bits: each update of about lr is off by at most a percent or so.
    assert (exact - rounded).abs().max() < 4 * 1e-2 * 0.05
    assert not torch.equal(exact, rounded)


def test_any_sharding_is_bit_equal(build, problem):
    weights, grads = problem
    whole = run(build, weights, grads, torch.bfloat16)
    for cut in (1, 777, THRESHOLDS.adamw_elements - 3, SIZE - 5):
        parts = [
            run(build, weights[s], [g[s] for g in grads], torch.bfloat16) for s in (slice(0, cut), slice(cut, None))
        ]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("moments", [torch.bfloat16, torch.float32])
def test_the_factor_of_the_gradient_is_that_of_a_product_before(build, problem, moments):
    weights, (grad, *_) = problem
    updated = []
    for factor, given in ((torch.tensor(0.3), grad.clone()), (None, grad * 0.3)):
        param = torch.nn.Parameter(weights.clone())
        optimizer = build(param, moments)
        param.grad, optimizer.handover.factor = given, factor
        optimizer.step()
        updated.append(param.detach())
    assert torch.equal(*updated)


def test_threads_change_no_bit(build, problem):
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run(build, *problem, torch.bfloat16))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("moments", [torch.bfloat16, torch.float32])
def test_gradients_in_pieces_give_the_update_of_the_whole_and_leave_padding(build, problem, moments):
    weights, (grad, *_) = problem
    updated, used = [], SIZE - 7
    for pieces in ([grad[:1000], grad[1000:used]], [grad[:used]]):
        param = torch.nn.Parameter(weights.clone())
        optimizer = build(param, moments)
        param.grad = torch.zeros(1).expand(SIZE)
        optimizer.handover.unreduced[param] = [one.clone() for one in pieces]
        optimizer.handover.divisor = 2
        optimizer.step()
        updated.append(param.detach())
    assert torch.equal(*updated)
    assert torch.equal(updated[0][used:], weights[used:]) and not torch.equal(updated[0][:used], weights[:used])


@pytest.mark.parametrize("size", [0, 1, 77, 4096, 4 * 4096 + 100])
def test_the_sum_of_squares_is_that_in_fp64(build, problem, size):
    x, optimizer = problem[0][:size] * 1e3, build(torch.nn.Parameter(torch.zeros(1)), torch.bfloat16)
    total = optimizer.sums_of_squares([x])[0]
    assert total.dtype == torch.float64 and total.item() == pytest.approx(x.double().square().sum().item(), rel=2e-7)
    if size:
        for bad in (torch.inf, torch.nan):
            x[size // 2] = bad
            assert not optimizer.sums_of_squares([x])[0].isfinite()
