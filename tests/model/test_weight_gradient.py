"""Products add to the fp32 sum of a weight's gradient; autograd gets the gradient where it was asked for it."""

from pathlib import Path

import pytest
import torch

import train.kernels.cpu.libraries as native
from parallel.pipeline.stage import backward_of_weights, kept_graph
from tests.interpret import needs_triton, run_interpreted
from train.kernels.cpu.compiled_kernels import CompiledKernels
from train.kernels.gpu.fused_kernels import FusedKernels
from train.kernels.plain.high import HighPrecision
from train.kernels.plain.plain_kernels import PlainKernels
from train.model.loss import cross_entropy
from train.model.operations import Kernels

torch.set_num_threads(1)
TESTS = Path(__file__).parent.parent


class GpuMatmuls(FusedKernels):
    """A GPU's, whose products have a CPU form, the reference of what CUDA has; the rest is torch's."""

    swiglu, swiglu_backward = PlainKernels.swiglu, PlainKernels.swiglu_backward


KERNELS = {
    "torch": PlainKernels,
    "compiled": lambda: CompiledKernels(matmuls=True),
    "gpu": GpuMatmuls,
}


@pytest.mark.slow
@needs_triton
def test_kernels_of_a_gpu_in_the_interpreter():
    run_interpreted(TESTS / "kernels" / "gpu", ["interpreted_weight_gradient", "interpreted_adamw"])


@pytest.fixture(params=KERNELS)
def kernels(request) -> Kernels:
    if request.param == "compiled" and native.why_absent() is not None:
        pytest.skip(native.why_absent())
    return KERNELS[request.param]()


def weight(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Parameter:
    param = torch.nn.Parameter(torch.randn(shape).to(dtype))
    param.grad_dtype = torch.float32
    return param


def losses(kernels: Kernels) -> dict:
    """For every kind of product: its weights, and a forward pass of some micro-batch that gives a scalar."""
    dense, w13, w2, head = weight(24, 40), weight(3, 32, 40), weight(3, 40, 16), weight(50, 40)
    high = HighPrecision(torch.bfloat16, kernels)

    def of_experts(x: torch.Tensor) -> torch.Tensor:
        counts = torch.tensor([7, 0, len(x) - 7])
        return high.expert_ffn(x, torch.ones(len(x)), w13, w2, counts).float().square().sum()

    def of_head(x: torch.Tensor) -> torch.Tensor:
        return cross_entropy(x, head, torch.arange(len(x)), 10, 9, kernels)

    return {
        "linear": ([dense], lambda x: high.linear(x, dense).float().square().sum()),
        "experts": ([w13, w2], of_experts),
        "head": ([head], of_head),
    }


@pytest.mark.parametrize("name", ["linear", "experts", "head"])
def test_micro_batches_add_up_in_place_to_what_autograd_would_add(kernels, name):
    torch.manual_seed(0)
    weights, loss = losses(kernels)[name]
    batches = [torch.randn(20, 40).bfloat16().requires_grad_() for _ in range(3)]
    handed = [torch.autograd.grad(loss(x), weights) for x in batches]
    assert all(one.grad is None for one in weights)
    sums = []
    for x in batches:
        loss(x).backward()
        sums.append([one.grad for one in weights])
    for param, *parts in zip(weights, *handed, strict=True):
        assert param.grad.dtype == torch.float32
        # In fp32 but for torch's operations on a CPU, which round a micro-batch to bf16, there and here alike.
        largest = param.grad.abs().max().item()
        torch.testing.assert_close(param.grad, sum(part.float() for part in parts), rtol=1e-5, atol=2e-6 * largest)
    assert all(one is other for one, other in zip(sums[0], sums[-1], strict=True))  # the same memory


@pytest.mark.parametrize("name", ["linear", "experts", "head"])
def test_the_second_part_of_a_split_backward_adds_the_same(kernels, name):
    from torch.distributed.pipelining._backward import stage_backward_input

    torch.manual_seed(0)
    weights, loss = losses(kernels)[name]
    x = torch.randn(20, 40).bfloat16().requires_grad_()
    for _ in range(2):
        loss(x).backward()
    whole = [one.grad for one in weights]
    for one in weights:
        one.grad = None
    for _ in range(2):
        out = loss(x)
        graph = kept_graph(out)
        _, groups = stage_backward_input([out], None, [x], iter(weights))
        backward_of_weights(groups)
        del graph
    assert all(torch.equal(one.grad, other) for one, other in zip(weights, whole, strict=True))


def test_nothing_is_rounded_to_bf16_on_a_gpu_or_in_compiled_code(kernels):
    if type(kernels) is PlainKernels or not ("products" in kernels.parts or isinstance(kernels, FusedKernels)):
        pytest.skip("torch's operations on a CPU round every micro-batch, and so does autograd")
    torch.manual_seed(0)
    weights, loss = losses(kernels)["linear"]
    x = torch.randn(20, 40).bfloat16()
    loss(x).backward()
    y = (x @ weights[0].t()).float().requires_grad_()
    (dy,) = torch.autograd.grad(y.square().sum(), y)
    torch.testing.assert_close(weights[0].grad, dy.bfloat16().float().t() @ x.float(), rtol=1e-4, atol=2e-2)
    assert not torch.equal(weights[0].grad, weights[0].grad.bfloat16().float())


def test_weights_in_other_formats_get_what_autograd_adds(kernels):
    """A sum of the weight's own format has no product that adds to it; nor has a weight that is no leaf."""
    param = torch.nn.Parameter(torch.randn(24, 40).bfloat16())
    scaled = weight(24, 40)
    high = HighPrecision(torch.bfloat16, kernels)
    x = torch.randn(6, 40).bfloat16()
    (high.linear(x, param).float().sum() + high.linear(x, scaled * 2).float().sum()).backward()
    assert param.grad.dtype == torch.bfloat16 and scaled.grad.dtype == torch.float32
    torch.testing.assert_close(scaled.grad, 2 * param.grad.float(), rtol=2**-7, atol=0)
