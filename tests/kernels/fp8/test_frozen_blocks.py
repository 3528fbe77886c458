"""A base in block FP8 on the meta device, which a plan traces."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from train.kernels.fp8.frozen_blocks import FrozenBlocks


class CountCopies(TorchDispatchMode):
    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += func is torch.ops.aten.copy_.default
        return func(*args, **(kwargs or {}))


def test_a_plan_sees_the_values_of_every_expert():
    module = nn.Module()
    module.w2 = nn.Parameter(torch.empty(5, 256, 128, device="meta", dtype=torch.bfloat16))
    blocks = FrozenBlocks(module, "w2")
    with CountCopies() as copies, torch.no_grad():
        values, _ = blocks.unpack(torch.bfloat16)
    assert values.shape == (5, 256, 128) and copies.found == 5
