"""Defines the layers that every block uses: linear layers, RMSNorm, SwiGLU, embedding.

The layers call kernels (train/model/operations.py) for all computation.

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
    """The input of a linear layer in the form that is saved for backward."""

    source: Any
    """The input in a form that only the `LayerPrecision` object reads."""
    tensors: Sequence[Tensor]
    """The tensors that contain the saved input."""
    values: Callable[..., Tensor]
    """Computes the input from `tensors`, in its original shape and dtype."""


class AddedMatmul(Protocol):
    """A second matmul whose result is added to a layer's output."""

    def add(self, y: Tensor, x: Tensor, groups: ExpertGroups | None = None) -> Tensor:
        """Return y (..., O) plus the result of the second matmul for x (..., I). groups: the rows of each expert, if
        the rows of x are sorted by expert; else None."""

    def widen(self, x: Tensor, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two operands of one matmul that computes the layer's output plus the second matmul's output.

        The operands are x and the weight. Both are extended by the same number of columns.
        """


class PackedWeight(Protocol):
    """A frozen weight that is stored in another form than a plain tensor of its values, such as FP8 blocks."""

    shape: tuple[int, ...]
    """The shape that the weight has as a plain tensor."""

    def unpack(self, dtype: torch.dtype) -> tuple[Tensor, AbstractContextManager]:
        """Return the values in `dtype`, and a context. Inside the context, autograd does not save the values; backward
        unpacks them again."""


PACKED = {"weight": "packed", "w13": "packed_up", "w2": "packed_down"}
"""Maps the last part of a weight's name to the module attribute that contains its packed form."""


def open_weight(
    packed: PackedWeight | None, weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, AbstractContextManager]:
    """Return the values of a weight for a matmul, and the context that the matmul must run in."""
    return (weight, nullcontext()) if packed is None else packed.unpack(dtype)


class LayerPrecision(Protocol):
    """Computes the matmuls in one precision. The model calls these methods and never branches on the precision."""

    dtype: torch.dtype
    """Dtype of activations between the matmuls."""
    kernels: Kernels
    """Computes the matmuls and all operations between them."""

    def linear(self, x: Tensor, weight: Tensor, kind: str = "dense", held: "HeldInput | None" = None) -> Tensor:
        """Return x (..., D) times the transpose of weight (F, D), as a tensor (..., F).

        kind: see `Linear`. held: the result of `hold` for x; None: `linear` saves x itself.
        """

    def hold(self, x: Tensor, kind: str) -> "HeldInput | None":
        """Return the form in which `linear` saves x for backward; None if it saves x unchanged.

        Other code that saves x too can save this form instead, so that x is stored once.
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
        """Compute the SwiGLU FFN of each expert for the rows of that expert. Returns a tensor (R, D).

        rows_RD: rows, sorted by expert. gates_R: gate value of each row, by which the SwiGLU output of the row is
        multiplied before the down-projection. counts_E: number of rows of each expert, int64. added: adapters for w13
        and for w2.
        """


class Linear(nn.Module):
    """A matmul without bias, in the precision of the run.

    kind: `output` for the attention's output projection, `dense` for all other layers. FP8 training saves the input of
    the output projection in a more precise format than the inputs of other layers.
    """

    def __init__(self, inputs: int, outputs: int, precision: LayerPrecision, kind: str = "dense", **factory):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, **factory))
        self._precision, self._kind = precision, kind
        self.added: AddedMatmul | None = None
        """The adapter of the weight, set by the code that trains an adapter."""
        self.packed: PackedWeight | None = None
        """The stored form of the frozen weight, if an adapter is trained and the weight is not stored as a plain
        tensor; else None."""

    def forward(self, x: Tensor, held: HeldInput | None = None) -> Tensor:
        weight, keep = open_weight(self.packed, self.weight, self._precision.dtype)
        with keep:
            y = self._precision.linear(x, weight, self._kind, held)
        return y if self.added is None else self.added.add(y, x)

    def values(self) -> tuple[Tensor, AbstractContextManager]:
        """Return the weight plus the product of its adapter's matrices, (O, I), and a context. Differentiable.

        A matmul with these values must run inside the context. The adapter's dropout then has the same mask for all
        rows.
        """
        weight, keep = open_weight(self.packed, self.weight, self._precision.dtype)
        if self.added is None:
            return weight, keep
        identity = torch.eye(weight.size(1), dtype=self._precision.dtype, device=weight.device)
        return self.added.add(weight.t(), identity).t(), nullcontext()

    def hold(self, x: Tensor) -> HeldInput | None:
        """Call `LayerPrecision.hold` for an input of this layer."""
        return self._precision.hold(x, self._kind)


class Embedding(nn.Module):
    """The table of token vectors. Its gradient is summed in fp32, even if the table has another dtype."""

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
    """Computes x / rms(x) * weight over the last axis, with statistics in fp32.

    recompute: whether a matmul that uses the norm's output saves only the norm's input for backward.
    """

    def __init__(self, width: int, eps: float, recompute: bool, kernels: Kernels, **factory):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, **factory))
        self._eps, self._recompute, self._kernels = eps, recompute, kernels

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self._eps, self._kernels)

    def with_remake(self, x: Tensor) -> tuple[Tensor, AbstractContextManager]:
        """Return the output, and a context for the matmuls that use the output as input (see `RecomputedOutputs`)."""
        y = self(x)
        if not (self._recompute and torch.is_grad_enabled()):
            return y, nullcontext()
        # Read the weight in backward and not here, because ZeRO 3 may free the weight's memory until backward.
        return y, RecomputedOutputs(lambda source: self._kernels.rms_norm(source, self.weight, self._eps)[0], (x,), y)


class _RMSNorm(Function):
    """Saves only the input and 1 / rms for backward."""

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
    """Compute `Kernels.swiglu`, with support for gradients."""
    return _SwiGLU.apply(h_N2F, gates_N, kernels)


class _SwiGLU(Function):
    """Saves only the input [gate | up] and the gate values of the rows, and recomputes all other values in backward."""

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
    """The SwiGLU feed-forward network: w2(silu(w1 x) * w3 x). The weight w13 has the rows of w1, followed by the rows
    of w3."""

    def __init__(self, width: int, inner: int, precision: LayerPrecision, recompute: bool, **factory):
        super().__init__()
        self.w13 = Linear(width, 2 * inner, precision, **factory)
        self.w2 = Linear(inner, width, precision, **factory)
        self._recompute, self._kernels = recompute, precision.kernels

    def forward(self, x_ND: Tensor, remake: AbstractContextManager) -> Tensor:
        """Return the output (N, D). remake: a context inside which autograd does not save x; backward computes x again
        (`RMSNorm.with_remake`)."""
        with remake:
            h_N2F = self.w13(x_ND)
        a_NF = swiglu(h_N2F, None, self._kernels)
        with recomputed_swiglu(a_NF, h_N2F, None, self._kernels) if self._recompute else nullcontext():
            return self.w2(a_NF)


def recomputed_swiglu(a_NF: Tensor, h_N2F: Tensor, gates_N: Tensor | None, kernels: Kernels) -> AbstractContextManager:
    """Return a context inside which autograd does not save a = swiglu(h, gates).

    Backward recomputes `a` from h and gates, which the SwiGLU saves anyway.
    """
    if not torch.is_grad_enabled():
        return nullcontext()
    sources = (h_N2F,) if gates_N is None else (h_N2F, gates_N)
    return RecomputedOutputs(lambda h, gates=None: kernels.swiglu(h, gates), sources, a_NF)
