"""Layers that every block uses: linear layers, RMSNorm, SwiGLU, embedding.

The kernels that they receive (train/model/operations.py) do the computing.

Shapes: N rows (any leading axes flattened), D width, F inner width, E experts, R rows routed to experts, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.model.needed import Function, gradients_needed, once_differentiable
from train.model.operations import ExpertGroups, Kernels
from train.model.recompute import RecomputedOutputs


class HeldInput(NamedTuple):
    """A linear layer's input in the form that is kept for backward."""

    source: Any
    """The input in the precision's own form."""
    tensors: Sequence[Tensor]
    """The tensors that hold the memory."""
    values: Callable[..., Tensor]
    """Maps the tensors to their values, in the shape and dtype of the input."""


class AddedMatmul(Protocol):
    """A second matmul whose result is added to a layer's output."""

    def add(self, y: Tensor, x: Tensor, groups: ExpertGroups | None = None) -> Tensor:
        """Return y (..., O) plus the contribution of x (..., I). groups: for rows that are sorted by expert."""

    def widen(self, x: Tensor, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Return operands of one matmul that gives the sum: x with more columns, and the weight with as many."""


class PackedWeight(Protocol):
    """A frozen weight that is stored in another form than the values that matmuls take."""

    shape: tuple[int, ...]
    """The shape of the values."""

    def unpack(self, dtype: torch.dtype) -> tuple[Tensor, AbstractContextManager]:
        """Return the values, and the context in which saving them for backward keeps nothing."""


PACKED = {"weight": "packed", "w13": "packed_up", "w2": "packed_down"}
"""Attribute of a module for the packed form of a weight, by the last part of the weight's name."""


def open_weight(
    packed: PackedWeight | None, weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, AbstractContextManager]:
    """Return a weight as a matmul takes it, and the context for the matmul."""
    return (weight, nullcontext()) if packed is None else packed.unpack(dtype)


class LayerPrecision(Protocol):
    """The dtypes of the matmuls. The model calls its methods and never branches on precision."""

    dtype: torch.dtype
    """Dtype of activations between the matmuls."""
    kernels: Kernels
    """Computes the matmuls and everything between them."""

    def linear(self, x: Tensor, weight: Tensor, kind: str = "dense", held: "HeldInput | None" = None) -> Tensor:
        """Return x (..., D) times weight (F, D) transposed: (..., F).

        kind: see `Linear`. held: the result of `hold` for x.
        """

    def hold(self, x: Tensor, kind: str) -> "HeldInput | None":
        """Return the form in which `linear` keeps x for backward, for other code that keeps it too; None if it keeps
        x unchanged.
        """

    def expert_ffn(
        self,
        rows_RD: Tensor,
        gates_R: Tensor,
        w13_E2FD: Tensor,
        w2_EDF: Tensor,
        counts_E: Tensor,
        added: "tuple[AddedMatmul | None, AddedMatmul | None]" = (None, None),
    ) -> Tensor:
        """Return the SwiGLU FFN of every expert on its own rows: (R, D).

        rows_RD is sorted by expert and counts_E (int64) has the rows per expert. The gate value of a row scales the
        SwiGLU output, before the down-projection. added: adapters for the matmuls of w13 and of w2.
        """


class Linear(nn.Module):
    """A matmul without bias, in the precision of the run.

    kind: `dense`, or `output` for the attention's output projection, whose input FP8 keeps in a finer format.
    """

    def __init__(self, inputs: int, outputs: int, precision: LayerPrecision, kind: str = "dense", **factory):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, **factory))
        self._precision, self._kind = precision, kind
        self.added: AddedMatmul | None = None
        """The adapter of the weight, set by the code that trains one."""
        self.packed: PackedWeight | None = None
        """The stored form of the weight next to an adapter, if it is not a plain tensor."""

    def forward(self, x: Tensor, held: HeldInput | None = None) -> Tensor:
        weight, keep = open_weight(self.packed, self.weight, self._precision.dtype)
        with keep:
            y = self._precision.linear(x, weight, self._kind, held)
        return y if self.added is None else self.added.add(y, x)

    def values(self) -> tuple[Tensor, AbstractContextManager]:
        """Return the weight with what the adapter adds, (O, I), and the context for who saves it. Differentiable.

        An adapter's dropout then drops inputs of all rows together.
        """
        weight, keep = open_weight(self.packed, self.weight, self._precision.dtype)
        if self.added is None:
            return weight, keep
        identity = torch.eye(weight.size(1), dtype=self._precision.dtype, device=weight.device)
        return self.added.add(weight.t(), identity).t(), nullcontext()

    def hold(self, x: Tensor) -> HeldInput | None:
        """See `LayerPrecision.hold`."""
        return self._precision.hold(x, self._kind)


class Embedding(nn.Module):
    """Table of token vectors. The gradient is summed in fp32 whatever the dtype of the table."""

    def __init__(self, rows: int, width: int, **factory):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width, **factory))

    def forward(self, tokens: Tensor) -> Tensor:
        return _Embed.apply(tokens, self.weight)


class _Embed(Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows = weight_VD.size(0)
        return F.embedding(tokens, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (tokens,) = ctx.saved_tensors
        return None, torch.ops.aten.embedding_dense_backward(grad.float(), tokens, ctx.rows, -1, False)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, statistics in fp32.

    recompute: whether matmuls that take the output keep only the input of the norm for backward.
    """

    def __init__(self, width: int, eps: float, recompute: bool, kernels: Kernels, **factory):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, **factory))
        self._eps, self._recompute, self._kernels = eps, recompute, kernels

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self._eps, self._kernels)

    def with_remake(self, x: Tensor) -> tuple[Tensor, AbstractContextManager]:
        """Return the output, and the context for the matmuls that take it (see `RecomputedOutputs`)."""
        y = self(x)
        if not (self._recompute and torch.is_grad_enabled()):
            return y, nullcontext()
        # The weight is read when it is needed: ZeRO stage 3 may free it in the meantime.
        return y, RecomputedOutputs(lambda source: self._kernels.rms_norm(source, self.weight, self._eps)[0], (x,), y)


class _RMSNorm(Function):
    """Keeps only the input and 1 / rms."""

    @staticmethod
    def forward(ctx, x: Tensor, weight_D: Tensor, eps: float, kernels: Kernels) -> Tensor:
        y, rstd = kernels.rms_norm(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, rstd)
        ctx.kernels = kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x_needed, weight_needed, *_ = gradients_needed(ctx)
        return *ctx.kernels.rms_norm_backward(grad, *ctx.saved_tensors, x_needed, weight_needed), None, None


def swiglu(h_N2F: Tensor, gates_N: Tensor | None, kernels: Kernels) -> Tensor:
    """`Kernels.swiglu`, with gradient."""
    return _SwiGLU.apply(h_N2F, gates_N, kernels)


class _SwiGLU(Function):
    """Keeps only [gate | up] and recomputes the rest in backward."""

    @staticmethod
    def forward(ctx, h_N2F: Tensor, gates_N: Tensor | None, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(h_N2F, gates_N)
        ctx.kernels = kernels
        return kernels.swiglu(h_N2F, gates_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NF: Tensor):
        return *ctx.kernels.swiglu_backward(grad_NF, *ctx.saved_tensors), None


class FFN(nn.Module):
    """SwiGLU feed-forward network: w2(silu(w1 x) * w3 x). w13 holds the rows of w1, then those of w3."""

    def __init__(self, width: int, inner: int, precision: LayerPrecision, recompute: bool, **factory):
        super().__init__()
        self.w13 = Linear(width, 2 * inner, precision, **factory)
        self.w2 = Linear(inner, width, precision, **factory)
        self._recompute, self._kernels = recompute, precision.kernels

    def forward(self, x_ND: Tensor, remake: AbstractContextManager) -> Tensor:
        """remake: the context in which saving x costs nothing (`RMSNorm.with_remake`)."""
        with remake:
            h_N2F = self.w13(x_ND)
        a_NF = swiglu(h_N2F, None, self._kernels)
        with recomputed_swiglu(a_NF, h_N2F, None, self._kernels) if self._recompute else nullcontext():
            return self.w2(a_NF)


def recomputed_swiglu(a_NF: Tensor, h_N2F: Tensor, gates_N: Tensor | None, kernels: Kernels) -> AbstractContextManager:
    """Return the context in which saving a = swiglu(h, gates) keeps nothing new: h and gates are kept for SwiGLU
    anyway.
    """
    if not torch.is_grad_enabled():
        return nullcontext()
    sources = (h_N2F,) if gates_N is None else (h_N2F, gates_N)
    return RecomputedOutputs(lambda h, gates=None: kernels.swiglu(h, gates), sources, a_NF)
