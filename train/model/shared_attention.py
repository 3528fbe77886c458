"""Computes attention of local positions over all positions of their sequences (context parallelism).

The ranks gather latents, not keys and values. Each piece of the sequence is a block. Only one block's keys and values
are in memory. The log-sum-exps of the scores combine the results of the blocks:

    forward    of block j: o_j = softmax(s_j) v_j and l_j = log sum exp s_j
               o = sum_j exp(l_j - l) o_j,  l = log sum_j exp l_j
    backward   p_j = exp(s_j - l),  ds_j = p_j * (do v_j^T - rowsum(do * o))

Backward gathers the latents and computes keys and values again. It sends a latent's gradient to the rank of the
position. If backward is split in two (needed.py), the first pass also computes the gradients of the weights that
compute keys and values, and stores these gradients for the second pass.

Shapes: B sequences, T positions of this rank, H heads, Q qk width, V value width, L positions of a block, C kv_rank, R
rope width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.model.attention import (
    AttentionCore,
    AttentionInput,
    AttentionOutput,
    KeptLse,
    LargestScores,
    positions_first,
)
from train.model.needed import Function, gradients_needed, is_recorded, once_differentiable
from train.model.sequence import PendingGather, Positions


@dataclass(frozen=True)
class KeysOfLatents:
    """Computes keys and values from latents.

    up: maps latents (B, L, C) to [nope key | value] of each head.
    """

    up: Callable[[Tensor], Tensor]
    heads: int
    kv_rank: int
    nope: int

    def make(self, kv_BLX: Tensor, k_rope_BLR: Tensor) -> tuple[Tensor, Tensor]:
        """Build keys (B, H, L, Q) and values (B, H, L, V) from [nope key | value] and shared rope keys."""
        kv_BHLX = kv_BLX.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_rope_BHLR = k_rope_BLR.unsqueeze(1).expand(-1, self.heads, -1, -1)
        return torch.cat([kv_BHLX[..., : self.nope], k_rope_BHLR], -1), kv_BHLX[..., self.nope :]

    def of(self, latents_BLX: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values. latents_BLX: [latent | rotated rope key]."""
        latent_BLC, k_rope_BLR = latents_BLX.split([self.kv_rank, latents_BLX.size(-1) - self.kv_rank], -1)
        return self.make(self.up(latent_BLC), k_rope_BLR)

    def gradients(
        self,
        latents_BLX: Tensor,
        weights: Sequence[Tensor],
        attend: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Return the gradients of queries, latents and weights for one block.

        attend: returns the gradients of queries, keys and values, from keys and values.
        """
        latent_BLC, k_rope_BLR = latents_BLX.split([self.kv_rank, latents_BLX.size(-1) - self.kv_rank], -1)
        with torch.enable_grad():
            source_BLC = latent_BLC.detach().requires_grad_()
            kv_BLX = self.up(source_BLC)
        dq, dk, dv = attend(*self.make(kv_BLX.detach(), k_rope_BLR))
        dkv_BLX = torch.cat([dk[..., : self.nope], dv], -1).transpose(1, 2).flatten(2)
        dlatent_BLC, *dweights = torch.autograd.grad(kv_BLX, (source_BLC, *weights), dkv_BLX)
        dk_rope_BLR = dk[..., self.nope :].sum(1, dtype=torch.float32).to(dlatent_BLC.dtype)
        return dq, torch.cat([dlatent_BLC, dk_rope_BLR], -1), dweights


class SharedAttention(Function):
    """Computes softmax(scale q k^T) v of the local queries over the keys of all positions: (B, H, T, V).

    latents_BTX: [latent | rotated rope key] of the local positions.
    weights: the trained weights of `keys.up`.
    gathering: the gather of all positions' latents, already in progress.
    watch, lse: see `AttentionInput`.
    """

    @staticmethod
    def forward(
        ctx,
        q_BHTQ: Tensor,
        latents_BTX: Tensor,
        keys: KeysOfLatents,
        core: AttentionCore,
        scale: float,
        positions: Positions,
        gathering: PendingGather,
        watch: LargestScores | None,
        lse: KeptLse | None,
        *weights: Tensor,
    ) -> Tensor:
        B, H, T, _ = q_BHTQ.shape
        watch = watch if is_recorded(ctx) else None
        out_BHTV, lse_BHT = None, None
        for seen, latents_BLX in zip(positions.seen, gathering.wait(), strict=True):
            k_BHLQ, v_BHLV = keys.of(latents_BLX)
            if out_BHTV is None or lse_BHT is None:
                out_BHTV = torch.zeros(B, H, T, v_BHLV.size(-1), dtype=torch.float32, device=q_BHTQ.device)
                lse_BHT = torch.full((B, H, T), -torch.inf, dtype=torch.float32, device=q_BHTQ.device)
            if not seen.rectangles:
                continue
            given = AttentionInput(q_BHTQ, k_BHLQ, v_BHLV, scale, seen, watch)
            made = core.forward(given, largest=watch is not None)
            if watch is not None:
                watch.add(made.largest_BHT)
            part_BHTV, part_BHT, *_ = made
            new_BHT = torch.logaddexp(lse_BHT, part_BHT)
            for sum_BHTV, value, of in ((out_BHTV, None, lse_BHT), (out_BHTV, part_BHTV, part_BHT)):
                share_BHT1 = (
                    (of - new_BHT).exp_().nan_to_num_(0).unsqueeze(-1)
                )  # 0 for a query that has seen no key yet
                if value is None:
                    sum_BHTV.mul_(share_BHT1)
                else:
                    sum_BHTV.addcmul_(value.to(sum_BHTV.dtype), share_BHT1)
            lse_BHT = new_BHT
        assert out_BHTV is not None and lse_BHT is not None, "a sequence has a piece"
        out_BHTV = positions_first(out_BHTV, q_BHTQ.dtype)
        ctx.save_for_backward(q_BHTQ, latents_BTX, out_BHTV, lse_BHT)
        if lse is not None:
            lse.lse_BHT = lse_BHT
        ctx.weights, ctx.keys, ctx.core, ctx.scale, ctx.positions = weights, keys, core, scale, positions
        ctx.put_aside = None
        return out_BHTV

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_BHTV: Tensor):
        q_needed, latents_needed, *needed = gradients_needed(ctx)
        rest = (None,) * 7
        weights_needed = any(needed[len(rest) :])
        if ctx.put_aside is not None and not (q_needed or latents_needed):
            dweights, ctx.put_aside = ctx.put_aside, None
            return None, None, *rest, *dweights
        q_BHTQ, latents_BTX, out_BHTV, lse_BHT = ctx.saved_tensors
        positions, whole = ctx.positions, AttentionOutput(out_BHTV, lse_BHT)
        rows = [len(piece) for piece in positions.pieces]
        gathering = positions.share.gather_begin(latents_BTX, rows)
        dq_BHTQ = torch.zeros(q_BHTQ.shape, dtype=torch.float32, device=q_BHTQ.device)
        dweights = [torch.zeros(one.shape, dtype=torch.float32, device=q_BHTQ.device) for one in ctx.weights]
        dlatents = []
        for seen, latents_BLX in zip(positions.seen, gathering.wait(), strict=True):
            if not seen.rectangles:
                dlatents.append(torch.zeros_like(latents_BLX))
                continue

            def attend(k, v, seen=seen):
                given = AttentionInput(q_BHTQ, k, v, ctx.scale, seen)
                return ctx.core.backward(dout_BHTV, given, whole)

            dq, dlatents_BLX, parts = ctx.keys.gradients(latents_BLX, ctx.weights, attend)
            dq_BHTQ += dq
            for dweight, part in zip(dweights, parts, strict=True):
                dweight += part
            dlatents.append(dlatents_BLX)
        dlatents_BTX = positions.share.scatter_sum(dlatents)
        if not weights_needed:
            ctx.put_aside = dweights
        return dq_BHTQ.to(q_BHTQ.dtype), dlatents_BTX, *rest, *(dweights if weights_needed else [None] * len(dweights))
