"""Attention over the keys that an indexer chose, in MLA's absorbed form (DeepSeek-V2 paper 2.1.2). For head i, and
position s with its normed latent c and rotated rope key:

    q_i . k_s = [W_UK_i^T q_nope_i ; q_rope_i] . [c_s ; k_rope_s]
    out_i     = W_UV_i sum_s p_is c_s,   p_i = softmax over the chosen s of scale q_i . k_s

All heads of a query use the same K keys, so one gather of the latents serves all heads. With o_i = sum_s p_is c_s and
the gradient u_i = W_UV_i^T do_i, backward computes

    ds = scale p (u . c - do . out),  dq = ds [c ; k_rope]
    d[c ; k_rope]_s = sum over queries and heads of ds q, and p u for c
    dW_UV_i = do_i o_i^T,  dW_UK_i = q_nope_i dq_i^T

Ranks that share sequences gather the latents of all positions. Backward sends each latent's gradient to its rank.

Shapes: B sequences, T queries of this rank, S positions of the sequence, H heads, Q qk width = nope + rope, X = C +
rope of a latent, C kv_rank, V value width, K chosen keys, Y = H * (nope + V) rows of the weight.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from train.model.attention import LargestScores
from train.model.needed import Function, gradients_needed, is_recorded, once_differentiable
from train.model.operations import Kernels
from train.model.sequence import PendingGather, Positions
from train.model.weight_gradient import weight_gradient


class ChosenInput(NamedTuple):
    """Arguments of attention over chosen keys."""

    q_BTHQ: Tensor
    """Queries, rotated by RoPE."""
    latents_BSX: Tensor
    """[latent | rope key] of each position, normed and rotated."""
    weight_YC: Tensor
    """Per head: the rows of W_UK, then of W_UV."""
    nope: int
    scale: float
    chosen_BTK: Tensor
    """Positions that each query attends to, int32; -1 fills missing keys."""

    def split_weight(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return W_UK (H, nope, C) and W_UV (H, V, C) in this dtype."""
        weight_HYC = self.weight_YC.to(dtype).unflatten(0, (self.q_BTHQ.size(2), -1))
        return weight_HYC[:, : self.nope], weight_HYC[:, self.nope :]


class ChosenOutput(NamedTuple):
    """Results of attention over chosen keys."""

    out_BTHV: Tensor
    """Output in q's dtype; 0 for a query without keys."""
    lse_BTH: Tensor
    """Log-sum-exp of each query's scaled scores, fp32; -inf for a query without keys."""
    largest_BTH: Tensor
    """The largest scaled score of each query, fp32."""
    shares_BTK: Tensor
    """Attention probability of each chosen key, averaged over heads, fp32."""


class KeptShares:
    """Stores probabilities of chosen keys for the indexer's loss."""

    shares_BTK: Tensor


class ChosenAttention(Function):
    """Computes attention of the local queries over their chosen keys: (B, H, T, V).

    latents_BTX: latents of the local positions.
    gathering: a started gather of all positions' latents; None if ranks do not share sequences.
    watch: see `AttentionInput`.
    shares: receives the attention probabilities of the chosen keys.
    """

    @staticmethod
    def forward(
        ctx,
        q_BTHQ: Tensor,
        latents_BTX: Tensor,
        weight_YC: Tensor,
        chosen_BTK: Tensor,
        nope: int,
        scale: float,
        kernels: Kernels,
        positions: Positions,
        gathering: PendingGather | None,
        watch: LargestScores | None,
        shares: KeptShares | None,
    ) -> Tensor:
        latents_BSX = latents_BTX if gathering is None else torch.cat(gathering.wait(), 1)
        made = kernels.attend_chosen(ChosenInput(q_BTHQ, latents_BSX, weight_YC, nope, scale, chosen_BTK))
        if watch is not None and is_recorded(ctx):
            watch.add(made.largest_BTH.transpose(1, 2))
        if shares is not None:
            shares.shares_BTK = made.shares_BTK
        out_BHTV = made.out_BTHV.transpose(1, 2)
        ctx.save_for_backward(q_BTHQ, latents_BTX, weight_YC, chosen_BTK, out_BHTV, made.lse_BTH)
        ctx.rest = nope, scale, kernels, positions
        return out_BHTV

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_BHTV: Tensor):
        q_BTHQ, latents_BSX, weight_YC, chosen_BTK, out_BHTV, lse_BTH = ctx.saved_tensors
        nope, scale, kernels, positions = ctx.rest
        rows = [len(piece) for piece in positions.pieces]
        if positions.share is not None:
            latents_BSX = torch.cat(positions.share.gather_begin(latents_BSX, rows).wait(), 1)
        given = ChosenInput(q_BTHQ, latents_BSX, weight_YC, nope, scale, chosen_BTK)
        dq_BTHQ, dlatents_BSX, dweight_YC = kernels.attend_chosen_backward(
            dout_BHTV.transpose(1, 2), given, out_BHTV.transpose(1, 2), lse_BTH
        )
        if positions.share is not None:
            dlatents_BSX = positions.share.scatter_sum(list(dlatents_BSX.split(rows, 1)))
        dweight = None
        if gradients_needed(ctx)[2]:
            dweight = weight_gradient(
                ctx, 2, weight_YC, lambda dtype, into: dweight_YC.to(dtype) if into is None else into.add_(dweight_YC)
            )
        return dq_BTHQ, dlatents_BSX, dweight, *(None for _ in range(8))
