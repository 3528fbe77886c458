"""Defines the layers that every block uses: linear layers, RMSNorm, SwiGLU, embedding. Kernels compute them.

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
    """A linear layer's input as saved for backward."""

    source: Any
    """The input in a form that only the `LayerPrecision` object reads."""
    tensors: Sequence[Tensor]
    """The tensors that contain the saved input."""
    values: Callable[..., Tensor]
    """Computes the input from `tensors`, in its original shape and dtype."""


class AddedMatmul(Protocol):
    """A second matmul whose result is added to a layer's output."""

    def add(self, y: Tensor, x: Tensor, groups: ExpertGroups | None = None) -> Tensor:
        """Return y (..., O) plus the adapter's output for x (..., I).

        groups: the rows of each expert, if x is sorted by expert.
        """

    def widen(self, x: Tensor, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Return the operands of one matmul that computes the layer's output plus the adapter's output. Extra columns
        extend x and the weight.
        """


class PackedWeight(Protocol):
    """A frozen weight that is not plain, such as FP8 blocks."""

    shape: tuple[int, ...]
    """The shape that the weight has as a plain tensor."""

    def unpack(self, dtype: torch.dtype) -> tuple[Tensor, AbstractContextManager]:
        """Return the values in `dtype`, and a context manager inside which autograd does not save them."""


PACKED = {"weight": "packed", "w13": "packed_up", "w2": "packed_down"}
"""Maps the last part of a weight's name to the module attribute of the `PackedWeight`."""


def open_weight(
    packed: PackedWeight | None, weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, AbstractContextManager]:
    """Return a weight's values for a matmul, and the context manager inside which the matmul must run."""
    return (weight, nullcontext()) if packed is None else packed.unpack(dtype)


class LayerPrecision(Protocol):
    """Computes matmuls in one precision, so that the model never branches on it."""

    dtype: torch.dtype
    """Dtype of activations between the matmuls."""
    kernels: Kernels
    """Computes the matmuls and all operations between them."""

    def linear(self, x: Tensor, weight: Tensor, kind: str = "dense", held: "HeldInput | None" = None) -> Tensor:
        """Return x (..., D) times the transpose of weight (F, D): (..., F).

        kind: see `Linear`. held: the result of `hold` for x; None: `linear` saves x itself.
        """

    def hold(self, x: Tensor, kind: str) -> "HeldInput | None":
        """Return the form in which `linear` saves x for backward; None if it saves x unchanged.

        Other code that saves x can save this form, so that x is stored once.
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
        """Compute the SwiGLU FFN of each expert for the rows of that expert. Returns (R, D).

        rows_RD: rows, sorted by expert.
        gates_R: gate value of each row; it multiplies the SwiGLU output.
        counts_E: number of rows of each expert, int64.
        added: adapters for w13 and for w2.
        """


class Linear(nn.Module):
    """A matmul without bias, in the precision of the run.

    kind: `output` for the attention's output projection, else `dense`. FP8 training saves the input of `output` more
    precisely.
    """

    def __init__(self, inputs: int, outputs: int, precision: LayerPrecision, kind: str = "dense", **factory):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, **factory))
        self._precision, self._kind = precision, kind
        self.added: AddedMatmul | None = None
        """The adapter of the weight, set before adapter training; else None."""
        self.packed: PackedWeight | None = None
        """The frozen weight's stored form, if not a plain tensor."""

    def forward(self, x: Tensor, held: HeldInput | None = None) -> Tensor:
        weight, keep = open_weight(self.packed, self.weight, self._precision.dtype)
        with keep:
            y = self._precision.linear(x, weight, self._kind, held)
        return y if self.added is None else self.added.add(y, x)

    def values(self) -> tuple[Tensor, AbstractContextManager]:
        """Return the weight plus the product of its adapter's matrices, (O, I), and a context manager. Differentiable.

        Use these values inside the context manager. The adapter's dropout has the same mask for all rows of an input.
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
    """The table of token vectors. Its gradient is summed in fp32."""

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

    recompute: whether a matmul that reads the output saves only the norm's input.
    """

    def __init__(self, width: int, eps: float, recompute: bool, kernels: Kernels, **factory):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, **factory))
        self._eps, self._recompute, self._kernels = eps, recompute, kernels

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self._eps, self._kernels)

    def with_remake(self, x: Tensor) -> tuple[Tensor, AbstractContextManager]:
        """Return the output, and a context manager for the matmuls that read it."""
        y = self(x)
        if not (self._recompute and torch.is_grad_enabled()):
            return y, nullcontext()
        # Read the weight in backward and not here, because ZeRO 3 may free it before backward.
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
    """Saves only [gate | up] and the gate values; backward recomputes the rest."""

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
    """The SwiGLU feed-forward network w2(silu(w1 x) * w3 x). w13 stacks w1 and w3."""

    def __init__(self, width: int, inner: int, precision: LayerPrecision, recompute: bool, **factory):
        super().__init__()
        self.w13 = Linear(width, 2 * inner, precision, **factory)
        self.w2 = Linear(inner, width, precision, **factory)
        self._recompute, self._kernels = recompute, precision.kernels

    def forward(self, x_ND: Tensor, remake: AbstractContextManager) -> Tensor:
        """Return the output (N, D).

        remake: context manager inside which autograd does not save x; backward recomputes x.
        """
        with remake:
            h_N2F = self.w13(x_ND)
        a_NF = swiglu(h_N2F, None, self._kernels)
        with recomputed_swiglu(a_NF, h_N2F, None, self._kernels) if self._recompute else nullcontext():
            return self.w2(a_NF)


def recomputed_swiglu(a_NF: Tensor, h_N2F: Tensor, gates_N: Tensor | None, kernels: Kernels) -> AbstractContextManager:
    """Return a context manager inside which autograd does not save a = swiglu(h, gates); backward recomputes a."""
    if not torch.is_grad_enabled():
        return nullcontext()
    sources = (h_N2F,) if gates_N is None else (h_N2F, gates_N)
    return RecomputedOutputs(lambda h, gates=None: kernels.swiglu(h, gates), sources, a_NF)
