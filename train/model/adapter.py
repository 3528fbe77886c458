"""Adds LoRA matrices A and B to frozen weights (arXiv 2106.09685): y = W x + scale B (A dropout(x)).

The matmul with W does not change, so LoRA works with any precision and storage format of W. The LoRA matmuls use the
activation dtype; their gradients are summed in fp32. A is initially uniform in +-1 / sqrt(inputs), as in PEFT. B is
initially 0.

Dropout decides whether to drop an input element by a hash of the values in its row, its column index, the step and the
weight's name. So any layout, a resumed run and a recomputed block drop the same elements. Rows with equal values have
equal dropout masks.

Shapes: N rows (any leading axes), R rows sorted by expert, I inputs and O outputs of a matmul, E experts of this rank,
Q rank of the LoRA matrices.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from conf.adapters import LoraNames, name_lora, target_of
from conf.schema import Adapter
from train.model.deepseek import DeepSeekV3
from train.model.init import draw_uniform, key_number
from train.model.layers import PACKED
from train.model.moe import Experts
from train.model.needed import Function
from train.model.operations import ExpertGroups, Kernels
from train.model.recompute import RecomputedOutputs
from train.model.weight_gradient import GroupedMatmul

MIX = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
"""The three constants of the hash splitmix64, as signed 64-bit integers."""


class LoraWeights:
    """LoRA matrices A and B of one weight, as parameters."""

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[LoraNames],
        adapter: Adapter,
        kernels: Kernels,
        chunk: DeepSeekV3,
        salt: str,
    ):
        """names: parameter names of A and B in `module`, one pair for each LoRA. The outputs of the pairs are
        concatenated.
        chunk: the model chunk that has the module.
        salt: makes the dropout hash different for each weight.
        """
        self._module, self._names, self._kernels, self._chunk = module, names, kernels, chunk
        self._scale, self._dropout, self._salt = adapter.scale, adapter.dropout, salt

    def add(self, y: Tensor, x: Tensor, groups: ExpertGroups | None = None) -> Tensor:
        """Return y plus the output of the LoRA matrices for x (N, I), as (N, O).

        groups: the rows of each expert, if x is sorted by expert.
        """
        dropped, keep = self._drop(x)
        parts = []
        for name_a, name_b in self._names:
            with keep:
                inner = self._matmul(dropped, getattr(self._module, name_a), groups) * self._scale
            parts.append(self._matmul(inner, getattr(self._module, name_b), groups))
        return y + (parts[0] if len(parts) == 1 else torch.cat(parts, -1))

    def widen(self, x: Tensor, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Return the operands of one matmul that computes the weight's output plus the LoRA output.

        The left operand is [x | scaled output of A]. The right operand is [weight | B].
        """
        ((name_a, name_b),) = self._names
        dropped, keep = self._drop(x)
        with keep:
            inner = self._kernels.linear(dropped, getattr(self._module, name_a)) * self._scale
        return torch.cat([x, inner], -1), torch.cat([weight_OI, getattr(self._module, name_b)], -1)

    def _matmul(self, x: Tensor, weight: Tensor, groups: ExpertGroups | None) -> Tensor:
        if groups is None:
            return self._kernels.linear(x, weight)
        return GroupedMatmul.apply(x, weight, groups, self._kernels)

    def _drop(self, x: Tensor) -> tuple[Tensor, AbstractContextManager]:
        """Return x after dropout, and a context manager inside which autograd saves x instead of the result."""
        if not (self._dropout and self._module.training):
            return x, nullcontext()
        drop = partial(_drop, share=self._dropout, salt=key_number(f"{self._chunk.step}/{self._salt}"))
        dropped = drop(x)
        if not torch.is_grad_enabled():
            return dropped, nullcontext()
        return dropped, RecomputedOutputs(drop, (x,), dropped)


def _drop(x: Tensor, share: float, salt: int) -> Tensor:
    """Set the fraction `share` of x's values to 0, and scale the other values up.

    A value becomes 0 if the product of its row's and its column's odd 64-bit hashes is below a threshold.
    """
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    column_I = _mixed(torch.arange(x.size(-1), device=x.device)) | 1
    row_N1 = (x.detach().contiguous().view(bits) * column_I).sum(-1, keepdim=True)
    row_N1 = _mixed(row_N1 ^ salt) | 1
    kept = row_N1 * column_I >= int((share - 0.5) * 2**64)
    return torch.where(kept, x / (1 - share), 0)


def _mixed(number: Tensor) -> Tensor:
    """Return the splitmix64 hash of int64 numbers, with right shifts that copy the sign bit."""
    first, second, third = MIX
    number = number + first
    number = (number ^ (number >> 30)) * second
    number = (number ^ (number >> 27)) * third
    return number ^ (number >> 31)


ADDED = {"weight": "added", "w13": "added_up", "w2": "added_down"}
"""Maps the last part of a weight's name to the module attribute of the adapter."""


def add_adapters(chunk: DeepSeekV3, adapter: Adapter, kernels: Kernels, seed: int) -> None:
    """Freeze the weights of a chunk, and add LoRA matrices A and B to the target weights.

    The values of A depend on the weight's name, so they are equal in every layout. On the meta device, no values are
    drawn.
    """
    bases = [(name, param) for name, param in chunk.named_parameters() if target_of(name) in (adapter.targets or ())]
    (dtype,) = {param.dtype for param in chunk.parameters()} - {torch.uint8}  # packed weights are stored as uint8
    for param in chunk.parameters():
        param.requires_grad_(False)
    for base, weight in bases:
        prefix, _, own = base.rpartition(".")
        module = chunk.get_submodule(prefix)
        names = [LoraNames(*(name.rpartition(".")[2] for name in pair)) for pair in name_lora(base)]
        packed = getattr(module, PACKED[own], None)
        *experts, outputs, inputs = weight.shape if packed is None else packed.shape
        for name_a, name_b in names:
            a = torch.empty(*experts, adapter.rank, inputs, dtype=dtype, device=weight.device)
            if not a.is_meta:
                local = module.local if isinstance(module, Experts) else None
                draw_uniform(a, f"{seed}/{prefix}.{name_a}", inputs**-0.5, local)
            setattr(module, name_a, nn.Parameter(a))
            setattr(module, name_b, nn.Parameter(a.new_zeros(*experts, outputs // len(names), adapter.rank)))
        setattr(module, ADDED[own], LoraWeights(module, names, adapter, kernels, chunk, f"{seed}/{base}"))
    if bases and hasattr(chunk, "embedding"):
        # The first tensor must require a gradient. Otherwise a recomputed block would record another graph in its
        # second run.
        chunk.embedding.register_forward_hook(_ask_for_gradient)


def _ask_for_gradient(module: nn.Module, given: object, out: Tensor) -> Tensor:
    """Return the embedding's output as a tensor that requires a gradient.

    The tensor is not a leaf, because autograd keeps a leaf and its gradient in memory.
    """
    return _Asking.apply(out, torch.empty(0, requires_grad=True)) if torch.is_grad_enabled() else out


class _Asking(Function):
    """Returns a view of x that requires a gradient, without a gradient for x.

    anchor: any tensor that requires a gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, None
