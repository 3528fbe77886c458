"""Runs Sluice's own code in fp64: all fp32 tensors become fp64, and nothing else changes.

In fp64 two orders of the same sum differ by about 1e-15 of its terms. A wrong scale, a missing term or another order of
tokens differs by its full size. So agreement to 1e-10 proves the same function, and not only a similar result.

A torch dispatch mode sees every operation below autograd, on all threads of a pipeline. There a new tensor, a cast or a
sum in fp32 becomes fp64. Operations without fp64 support have a plain form here.
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
    """Inside the block, new fp32 tensors are fp64. Tensors from outside stay fp32."""
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
    """F.grouped_mm: each group of rows times its own matrix; for two matrices, each group of columns times its rows."""
    assert offs is not None and bias is None
    ends = offs.tolist()
    spans = list(zip([0, *ends], ends, strict=False))
    if right.dim() == 3:
        out = left.new_zeros(left.size(0), right.size(2))
        for number, (first, last) in enumerate(spans):
            out[first:last] = left[first:last] @ right[number]
        return out
    return torch.stack([left[:, first:last] @ right[first:last] for first, last in spans])
