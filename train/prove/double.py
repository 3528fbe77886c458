"""The product's own code in fp64: whatever it asks for in fp32 it gets in fp64, and nothing else of it changes.

In fp64 two ways to the same sum differ by some 1e-15 of its terms, where a wrong scale, a missing term or another order of
tokens differs by what it is. So what agrees to 1e-10 is the same function, and not only near to it.

torch shows every operation below autograd, of all lanes of a pipeline, to a dispatch mode. There a new tensor, a cast or a sum in
fp32 becomes one in fp64. A product that knows no fp64 has its plain form here.
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
    """Everything inside that would be fp32 is fp64. What comes from outside in fp32 stays so."""
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
            return grouped_product(*args, **kwargs)
        if kwargs.get("dtype") in WIDER:
            kwargs["dtype"] = WIDER[kwargs["dtype"]]
        return func(*args, **kwargs)


def grouped_product(
    left: Tensor, right: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """F.grouped_mm: each group of rows with its own matrix; or, where both are matrices, over each group of columns and rows."""
    assert offs is not None and bias is None
    ends = offs.tolist()
    spans = list(zip([0, *ends], ends, strict=False))
    if right.dim() == 3:
        out = left.new_zeros(left.size(0), right.size(2))
        for number, (first, last) in enumerate(spans):
            out[first:last] = left[first:last] @ right[number]
        return out
    return torch.stack([left[:, first:last] @ right[first:last] for first, last in spans])
