"""The attention core, softmax(scale q k^T) v, of queries that see some of the keys: the one place that says what it takes and returns.

Who computes it stands in train/kernels. Who sees whom comes as rectangles (train/model/sequence.py): whole sequences and packed
documents are squares with a diagonal, and what ranks that share sequences ask of one another is any. Nothing above a diagonal or
between documents is computed, or kept as a mask. Backward computes the probabilities again from the log-sum-exp of the scores, l,
which may be that over more keys than these:

    p = exp(scale q k^T - l),  dv = p^T do,  ds = scale p * (do v^T - rowsum(do * o)),  dq = ds k,  dk = ds^T q

Shapes: B sequences, H heads, T queries, S keys, Q qk width, V value width.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from train.model.needed import Function, is_recorded, once_differentiable
from train.model.sequence import SeenKeys


class AttentionInput(NamedTuple):
    """What attention takes."""

    q_BHTQ: Tensor
    k_BHSQ: Tensor
    v_BHSV: Tensor
    scale: float
    seen: SeenKeys
    watch: "LargestScores | None" = None
    """Is told of the scores of a call that is trained."""


class LargestScores:
    """The largest scaled score of each head over all calls since `clear`: most_H, fp32.

    limit: a core that would have to compute the scores once more may tell their log-sum-exp, which is never less, of a query for
    which that is not above the limit.
    """

    def __init__(self, heads: int, limit: float, device: torch.device):
        self.limit = limit
        self.most_H = torch.empty(heads, device=device)
        self.clear()

    def clear(self) -> None:
        self.most_H.fill_(-torch.inf)

    def add(self, made: "AttentionOutput") -> None:
        assert made.largest_BHT is not None, "was asked for"
        torch.maximum(self.most_H, made.largest_BHT.amax((0, 2)), out=self.most_H)


class AttentionOutput(NamedTuple):
    """What attention returns."""

    out_BHTV: Tensor
    """In v's format, positions first in memory, as the output projection takes it. 0 of a query that sees nothing."""
    lse_BHT: Tensor
    """Log-sum-exp of the scaled scores of each query, fp32. -inf of one that sees nothing."""
    largest_BHT: Tensor | None = None
    """The largest scaled score of each query, fp32, where it was asked for; see `LargestScores.limit`."""
    kept: Tensor | None = None
    """What else the core wants in backward."""


class AttentionCore(Protocol):
    """Computes attention, forward and backward."""

    takes_documents: bool
    """Whether it is made for pieces of any length."""

    def forward(self, given: AttentionInput, keep: bool = False, largest: bool = False) -> AttentionOutput:
        """keep: whether `kept` shall be there for a backward. largest: whether the largest scores are asked for."""

    def backward(
        self, dout_BHTV: Tensor, given: AttentionInput, made: AttentionOutput
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v. made: by `forward`, or output and log-sum-exp over all keys that the queries see, these among them."""


def positions_first(x_BHTV: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in that format, and as `AttentionOutput.out_BHTV` lies in memory."""
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
            watch.add(made)
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
            None,
            None,
            None,
        )
