"""Runs Sluice's own code in fp64 instead of fp32.

The order of an fp64 sum changes the result by only about 1e-15 of its terms. So two programs that agree to 1e-10
compute the same function.

A torch dispatch mode replaces fp32 below autograd. torch's grouped matmul does not support fp64, so this file has a
plain version.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}


@contextmanager
def in_double() -> Iterator[None]:
    """Creates fp64 instead of fp32 tensors inside the `with` block."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _AtLeastDouble():
            yield
    finally:
        torch.set_default_dtype(default)


class _AtLeastDouble(TorchDispatchMode):
    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten._grouped_mm.default:
            return grouped_matmul(*args, **kwargs)
        if kwargs.get("dtype") in WIDER:
            kwargs["dtype"] = WIDER[kwargs["dtype"]]
        return func(*args, **kwargs)


def grouped_matmul(
    left: Tensor, right: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """Computes F.grouped_mm in fp64. `right` has one of two forms:

    stack of matrices    each group of rows of `left` times the group's matrix
    one matrix           each group of columns of `left` times the same group of rows of `right`
    """
    assert offs is not None and bias is None
    ends = offs.tolist()
    spans = list(zip([0, *ends], ends, strict=False))
    if right.dim() == 3:
        out = left.new_zeros(left.size(0), right.size(2))
        for number, (first, last) in enumerate(spans):
            out[first:last] = left[first:last] @ right[number]
        return out
    return torch.stack([left[:, first:last] @ right[first:last] for first, last in spans])
