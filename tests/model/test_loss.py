"""Chunked cross-entropy against torch's, and the memory that it saves."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from train.kernels.choice import build_kernels
from train.kernels.plain.plain_kernels import PlainKernels
from train.model.loss import cross_entropy

torch.set_num_threads(1)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_equals_torch(chunk):
    torch.manual_seed(0)
    hidden = torch.randn(23, 8, requires_grad=True)
    head = torch.randn(31, 8, requires_grad=True)
    targets = torch.randint(31, (23,))
    loss = cross_entropy(hidden, head, targets, 50, chunk, build_kernels("cpu"))
    expected = F.cross_entropy(hidden @ head.T, targets, reduction="sum") / 50
    torch.testing.assert_close(loss, expected)
    got = torch.autograd.grad(loss * 3, [hidden, head])
    torch.testing.assert_close(got, torch.autograd.grad(expected * 3, [hidden, head]))


def test_only_the_gradients_that_are_asked_for():
    hidden, head, targets = torch.randn(5, 4), torch.randn(6, 4, requires_grad=True), torch.randint(6, (5,))
    cross_entropy(hidden, head, targets, 5, 2, build_kernels("cpu")).backward()
    assert head.grad is not None
    assert not cross_entropy(hidden, head.detach(), targets, 5, 2, build_kernels("cpu")).requires_grad


class CountedMatmuls(PlainKernels):
    number = 0

    def matmul(self, *args):
        self.number += 1
        return super().matmul(*args)


def test_a_pass_that_nothing_goes_back_through_computes_no_gradient():
    """Not of a weight that trains either: that gradient is as large as the weight, and a product that an evaluation would wait for."""
    kernels, head, targets = CountedMatmuls(), torch.nn.Parameter(torch.randn(50, 8)), torch.randint(50, (4,))
    hidden = torch.randn(4, 8, requires_grad=True)
    with torch.no_grad():
        without = cross_entropy(hidden, head, targets, 4, 4, kernels)
    assert kernels.number == 1 and not without.requires_grad
    assert torch.equal(cross_entropy(hidden, head, targets, 4, 4, kernels), without) and kernels.number == 1 + 3


def test_bf16_head_sums_its_gradient_over_chunks_in_fp32():
    """64 chunks summed in bf16 would lose 1 %; in fp32 chunking changes the gradient by a rounding of its parts."""
    torch.manual_seed(0)
    hidden, targets = torch.randn(256, 16).bfloat16(), torch.randint(10, (256,))
    gradients = []
    for chunk in (4, 256):
        head = torch.nn.Parameter(torch.randn(10, 16, generator=torch.Generator().manual_seed(1)).bfloat16())
        head.grad_dtype = torch.float32
        loss = cross_entropy(hidden, head, targets, 256, chunk, build_kernels("cpu"))
        assert loss.dtype == torch.float32
        loss.backward()
        assert head.grad.dtype == torch.float32
        gradients.append(head.grad)
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 3e-3


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_logits_of_all_tokens_never_exist():
    hidden, head = torch.randn(64, 4, requires_grad=True), torch.randn(500, 4, requires_grad=True)
    with LargestTensor() as largest:
        cross_entropy(hidden, head, torch.randint(500, (64,)), 64, 8, build_kernels("cpu")).backward()
    assert largest.numel == 8 * 500
