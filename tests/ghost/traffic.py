"""Bytes that a stretch of a program moves, and what it computes on tensors of the host, seen at torch's dispatcher.

An estimate of memory traffic: every operation reads its inputs once and writes its outputs once. Products and attention are left
out, as they are bound by arithmetic; so are views and tensors that are only made, and what stands in for other ranks. Other kernels
of Triton count all their tensors.
"""

import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conf.schema import ROOT
from parallel.expert.wire import QuantizedRows

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "_scaled_mm", "_scaled_mm_v2", "_scaled_grouped_mm_v2")
WRITTEN_OVER = {"_heads_kernel": 0}
"""The tensor, by its place, that a kernel of Triton reads and writes."""
TRITON_MATMULS = (
    "_matmul_kernel",
    "_wgrad_kernel",
    "_gradient_kernel",
    "_chosen_lse_kernel",
    "_chosen_weights_kernel",
    "_chosen_sums_kernel",
)
ATTENTION = "_scaled_dot_product", "_efficient_attention"
ONLY_WRITTEN = (
    "zero_",
    "fill_",
    "copy_",
    "normal_",
    "new_zeros",
    "new_ones",
    "new_full",
    "zeros_like",
    "ones_like",
    "full_like",
)
"""Operations that do not read their first argument."""
STAND_IN = "parallel/expert/stand_in.py"
"""It copies rows where a job has an exchange, and makes up which rows: neither is in a job."""
TO_THE_DEVICE = (
    "_to_copy",
    "copy_",
    "_pin_memory",
    "pin_memory",
    "is_pinned",
    "lift_fresh",
    "detach",
    "_local_scalar_dense",
)
"""What a tensor of the host may be used for in a step: small numbers on their way between host and device."""


class Traffic(TorchDispatchMode):
    """Counts while it is entered, in the threads of autograd too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.by_line: Counter[str] = Counter()
        """Bytes by the line of this project that asked for the operation, or by the name of our kernel."""
        self.on_host: Counter[str] = Counter()
        """Operations that compute on the host's tensors, with their line."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if any(isinstance(leaf, QuantizedRows) for leaf in tree_leaves((args, kwargs))):
            with self:  # what it makes of the operation is counted in its place
                return QuantizedRows.__torch_dispatch__(operation, types, args, kwargs)
        result = operation(*args, **(kwargs or {}))
        name = operation._schema.name.removeprefix("aten::")
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        if name not in TO_THE_DEVICE and not name.startswith(("empty", "new_empty")):
            self._note_host(name, [*inputs, *outputs])
        taken = inputs[1:] if name in ONLY_WRITTEN else inputs
        view = not operation._schema.is_mutable and {_storage(one) for one in outputs} & {
            _storage(one) for one in inputs
        }
        if not view and name not in PRODUCTS and not name.startswith((*ATTENTION, "empty", "new_empty")):
            self.add(taken, outputs)
        return result

    def add(self, *sides: list[Tensor], name: str = "") -> None:
        """Tensors that are read, and those that are written. name: of a kernel, which stands for its line."""
        place = project_line()
        if place.startswith(STAND_IN):
            return
        moved = sum(bytes_of([one for one in side if one.is_cuda]) for side in sides)
        self.bytes += moved
        self.by_line[name or place] += moved

    def _note_host(self, name: str, tensors: list[Tensor]) -> None:
        if any(one.device.type == "cpu" and one.numel() > 1 for one in tensors):
            self.on_host[f"{name} at {project_line()}"] += 1


@contextmanager
def traffic() -> Iterator[Traffic]:
    """`Traffic` of the block, with Triton's kernels."""
    from parallel.triton_types import QuickKernel

    mode, launch = Traffic(), QuickKernel.launch

    def counted(kernel, grid, *args, **options):
        name = kernel.kernel.fn.__name__
        if name not in TRITON_MATMULS:
            mode.add(*sides_of(name, args), name=f"Triton kernel {name.strip('_').removesuffix('_kernel')}")
        return launch(kernel, grid, *args, **options)

    QuickKernel.launch = counted
    try:
        with mode:
            yield mode
    finally:
        QuickKernel.launch = launch


def sides_of(name: str, args: Iterable[object]) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors that one of our kernels of Triton, by its name, reads or writes, and those that it does both to."""
    tensors = _tensors(list(args))
    return tensors, [tensors[WRITTEN_OVER[name]]] if name in WRITTEN_OVER else []


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of all of them, what lies at one address once."""
    largest: dict[int, int] = {}
    for one in tensors:
        largest[one.data_ptr()] = max(_bytes(one), largest.get(one.data_ptr(), 0))
    return sum(largest.values())


def project_line() -> str:
    """FILE:LINE of the innermost caller in this project, tests and bench aside; autograd's own nodes have none."""
    for frame in reversed(traceback.extract_stack(limit=40)):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("train", "parallel"):
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "torch's own backward"


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
