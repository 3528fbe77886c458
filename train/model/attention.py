"""The interface of the attention core, softmax(scale q k^T) v, for queries that see some of the keys.

train/kernels implements it. Rectangles (train/model/sequence.py) say which queries see which keys: whole sequences and
packed documents are squares with a diagonal; ranks that share sequences use arbitrary rectangles. Nothing above a
diagonal or between documents is computed, or kept as a mask. Backward recomputes the probabilities from the log-sum-exp
of the scores, l, which may cover more keys than these:

    p = exp(scale q k^T - l),  dv = p^T do,  ds = scale p * (do v^T - rowsum(do * o)),  dq = ds k,  dk = ds^T q

Shapes: B sequences, H heads, T queries, S keys, Q qk width, V value width.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from train.model.needed import Function, is_recorded, once_differentiable
from train.model.sequence import SeenKeys


class AttentionInput(NamedTuple):
    """Arguments of attention."""

    q_BHTQ: Tensor
    k_BHSQ: Tensor
    v_BHSV: Tensor
    scale: float
    seen: SeenKeys
    watch: "LargestScores | None" = None
    """Receives the scores of training calls."""
    lse: "KeptLse | None" = None
    """Receives the log-sum-exp of the scores of a training call."""


class KeptLse:
    """The log-sum-exp of the scores of one call, for callers that need it besides the output."""

    lse_BHT: Tensor


class LargestScores:
    """The largest scaled score of each head over all calls since `clear`: most_H, fp32.

    limit: some cores would have to compute the scores again. For a query whose log-sum-exp is at most `limit`, such a
    core may return the log-sum-exp instead, which is an upper bound of its scores.
    """

    def __init__(self, heads: int, limit: float, device: torch.device):
        self.limit = limit
        self.most_H = torch.empty(heads, device=device)
        self.clear()

    def clear(self) -> None:
        self.most_H.fill_(-torch.inf)

    def add(self, largest_BHT: Tensor | None) -> None:
        assert largest_BHT is not None, "was asked for"
        torch.maximum(self.most_H, largest_BHT.amax((0, 2)), out=self.most_H)


class AttentionOutput(NamedTuple):
    """Results of attention."""

    out_BHTV: Tensor
    """In v's dtype, positions first in memory, as the output projection takes it. 0 for a query that sees nothing."""
    lse_BHT: Tensor
    """Log-sum-exp of the scaled scores of each query, fp32. -inf for a query that sees nothing."""
    largest_BHT: Tensor | None = None
    """The largest scaled score of each query, fp32, if requested; see `LargestScores.limit`."""
    kept: Tensor | None = None
    """Other data that the core needs in backward."""


class AttentionCore(Protocol):
    """Computes attention, forward and backward."""

    takes_documents: bool
    """Whether it supports pieces of any length."""

    def forward(self, given: AttentionInput, keep: bool = False, largest: bool = False) -> AttentionOutput:
        """Compute attention.

        keep: whether to return `kept` for a backward. largest: whether to return the largest scores.
        """

    def backward(
        self, dout_BHTV: Tensor, given: AttentionInput, made: AttentionOutput
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v.

        made: the result of `forward`, or output and log-sum-exp over all keys that the queries see, these keys
        included.
        """


def positions_first(x_BHTV: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy in this dtype, in the memory order of `AttentionOutput.out_BHTV`."""
    B, H, T, V = x_BHTV.shape
    return x_BHTV.new_empty(B, T, H, V, dtype=dtype).transpose(1, 2).copy_(x_BHTV)


class Attend(Function):
    """`AttentionInput` to the output, with a core."""

    @staticmethod
    def forward(ctx, core: AttentionCore, *given):
        given = AttentionInput(*given)
        trained = is_recorded(ctx)
        watch = given.watch if trained else None
        made = core.forward(given, keep=trained, largest=watch is not None)
        if watch is not None:
            watch.add(made.largest_BHT)
        if given.lse is not None:
            given.lse.lse_BHT = made.lse_BHT
        ctx.save_for_backward(*given[:3], made.out_BHTV, made.lse_BHT, made.kept)
        ctx.core, ctx.rest = core, given[3:]
        return made.out_BHTV

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_BHTV):
        q_BHTQ, k_BHTQ, v_BHTV, out_BHTV, lse_BHT, kept = ctx.saved_tensors
        given = AttentionInput(q_BHTQ, k_BHTQ, v_BHTV, *ctx.rest)
        return (
            None,
            *ctx.core.backward(dout_BHTV, given, AttentionOutput(out_BHTV, lse_BHT, kept=kept)),
            *(None for _ in ctx.rest),
        )
