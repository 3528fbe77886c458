"""Defines the interface of the attention core, softmax(scale q k^T) v. train/kernels implements the core.

Rectangles (train/model/sequence.py) describe which queries see which keys. A complete sequence or a packed document is
a square, where queries see keys up to the diagonal. Ranks that share sequences use arbitrary rectangles.

The core computes no scores above a diagonal or between documents, and stores no mask. Backward recomputes the
probabilities p from l, the log-sum-exp of a query's scores. l may include scores of keys outside this call:

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
    """Records the largest attention scores in training; None if not needed."""
    lse: "KeptLse | None" = None
    """Stores the log-sum-exp of the scores; None if not needed."""


class KeptLse:
    """Stores the log-sum-exp of one attention call's scores."""

    lse_BHT: Tensor


class LargestScores:
    """Records the largest scaled score of each head in `most_H` (fp32), over all calls since the last `clear`.

    limit: if a query's log-sum-exp is at most `limit`, a core may return the log-sum-exp, an upper bound, instead of
        the largest score.
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
    """Output in v's dtype, 0 for a query that sees no key. In memory, positions come before heads."""
    lse_BHT: Tensor
    """Log-sum-exp of each query's scaled scores, fp32; -inf for a query that sees no key."""
    largest_BHT: Tensor | None = None
    """Largest scaled score of each query, fp32, if requested (`LargestScores.limit`)."""
    kept: Tensor | None = None
    """Other data that the attention core needs in backward."""


class AttentionCore(Protocol):
    """Computes attention, forward and backward."""

    takes_documents: bool
    """Whether the core can compute attention within documents of any length."""

    def forward(self, given: AttentionInput, keep: bool = False, largest: bool = False) -> AttentionOutput:
        """Compute attention.

        keep: whether to set `AttentionOutput.kept`, which backward needs. largest: whether to return the largest
        scores.
        """

    def backward(
        self, dout_BHTV: Tensor, given: AttentionInput, made: AttentionOutput
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v.

        made: output and log-sum-exp over all keys of this call, and possibly also over keys of other calls.
        """


def positions_first(x_BHTV: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy in `dtype`, in the memory order of `AttentionOutput.out_BHTV`."""
    B, H, T, V = x_BHTV.shape
    return x_BHTV.new_empty(B, T, H, V, dtype=dtype).transpose(1, 2).copy_(x_BHTV)


class Attend(Function):
    """Applies an attention core to an `AttentionInput`, and returns the output."""

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
