"""Multi-head latent attention (paper 2.1.1, eq. 1-11), training form: keys and values are formed for every head.

    c_Q  = norm(W_DQ x)            q = [W_UQ c_Q ; RoPE(W_QR c_Q)]      per head
    c_KV = norm(W_DKV x)           k = [W_UK c_KV ; RoPE(W_KR x)]       the rope key is one for all heads
                                   v =  W_UV c_KV
    y = W_O softmax(scale q k^T) v

q_down, q_up, kv_down, kv_up and out hold the W's, packed as in the released weights: kv_down gives [c_KV | rope key],
q_up per head [nope | rope], kv_up per head [nope key | value]. Without q_rank, `q` projects x directly.

Shapes: B sequences, T positions, D width, H heads, Q qk width = nope + rope, R rope width, V value width.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from conf.schema import Model, Recompute
from train.model.layers import Linear, Precision, RMSNorm
from train.model.recompute import Recomputed
from train.model.rope import Rope, rotate


class MLA(nn.Module):
    """Multi-head latent attention of one block."""

    def __init__(self, config: Model, precision: Precision, rope: Rope, **factory):
        super().__init__()
        width, heads = config.hidden, config.heads
        qk_width = config.nope_head_dim + config.rope_head_dim
        recompute_norm = Recompute.norm in config.recompute
        if config.q_rank is None:
            self.q = Linear(width, heads * qk_width, precision, **factory)
        else:
            self.q_down = Linear(width, config.q_rank, precision, **factory)
            self.q_norm = RMSNorm(config.q_rank, config.norm_eps, recompute_norm, **factory)
            self.q_up = Linear(config.q_rank, heads * qk_width, precision, **factory)
        self.kv_down = Linear(width, config.kv_rank + config.rope_head_dim, precision, **factory)
        self.kv_norm = RMSNorm(config.kv_rank, config.norm_eps, recompute_norm, **factory)
        self.kv_up = Linear(config.kv_rank, heads * (config.nope_head_dim + config.v_head_dim), precision, **factory)
        self.out = Linear(heads * config.v_head_dim, width, precision, kind="output", **factory)
        self._config, self._rope = config, rope
        self._recompute_up = Recompute.mla_up in config.recompute

    def forward(self, x_BTD: Tensor, recipe: AbstractContextManager, documents_BT: Tensor | None = None) -> Tensor:
        """recipe: the context in which saving x costs nothing (`RMSNorm.with_recipe`). Returns (B, T, D)."""
        with recipe:
            # q_latent is the whole query where queries are not compressed
            q_latent = self.q(x_BTD) if self._config.q_rank is None else self.q_down(x_BTD)
            kv_latent, k_rope_BTR = self.kv_down(x_BTD).split([self._config.kv_rank, self._config.rope_head_dim], -1)
        heads = self._up(q_latent, kv_latent, k_rope_BTR)
        keep = nullcontext()
        if self._recompute_up and torch.is_grad_enabled():
            sources = q_latent.detach(), kv_latent.detach(), k_rope_BTR.detach()
            keep = Recomputed(lambda: self._up(*sources), *heads)
        with keep:
            out_BHTV = attention(*(t.transpose(1, 2) for t in heads), self._rope.softmax_scale, documents_BT)
        out_BTHV = out_BHTV[..., : self._config.v_head_dim].transpose(1, 2)
        return self.out(out_BTHV.flatten(2))

    def _up(self, q_latent: Tensor, kv_latent: Tensor, k_rope_BTR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (B, T, H, Q) and values for attention from the latents."""
        config = self._config
        if config.q_rank is not None:
            q_latent, recipe = self.q_norm.with_recipe(q_latent)
            with recipe:
                q_latent = self.q_up(q_latent)
        kv_latent, recipe = self.kv_norm.with_recipe(kv_latent)
        with recipe:
            kv = self.kv_up(kv_latent)
        table = self._rope.table(q_latent.size(1), q_latent.device)
        # The CPU flash kernel wants values as wide as keys; CUDA kernels take them as they are.
        v_width = config.v_head_dim if q_latent.is_cuda else config.nope_head_dim + config.rope_head_dim
        return _Heads.apply(
            q_latent.unflatten(-1, (config.heads, -1)),
            kv.unflatten(-1, (config.heads, -1)),
            k_rope_BTR,
            table,
            config.nope_head_dim,
            max(v_width, config.v_head_dim),
        )


class _Heads(torch.autograd.Function):
    """Turn the rope parts, give every head the one rope key, pad values with zeros to v_width."""

    @staticmethod
    def forward(ctx, q_BTHQ, kv_BTHX, k_rope_BTR, table, nope: int, v_width: int):
        batch, length, heads, _ = q_BTHQ.shape
        v_head_dim = kv_BTHX.size(-1) - nope
        q_out, k_out = torch.empty_like(q_BTHQ), torch.empty_like(q_BTHQ)
        v_out = q_BTHQ.new_empty(batch, length, heads, v_width)
        q_out[..., :nope] = q_BTHQ[..., :nope]
        q_out[..., nope:] = rotate(q_BTHQ[..., nope:], table)
        k_out[..., :nope] = kv_BTHX[..., :nope]
        k_out[..., nope:] = rotate(k_rope_BTR.unsqueeze(2), table)
        v_out[..., :v_head_dim] = kv_BTHX[..., nope:]
        v_out[..., v_head_dim:] = 0
        ctx.table, ctx.nope, ctx.v_head_dim = table, nope, v_head_dim
        return q_out, k_out, v_out

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_BTHQ, dk_BTHQ, dv):
        nope, back = ctx.nope, ctx.table.conj()
        dq = torch.empty(dq_BTHQ.shape, dtype=dq_BTHQ.dtype, device=dq_BTHQ.device)
        dq[..., :nope] = dq_BTHQ[..., :nope]
        dq[..., nope:] = rotate(dq_BTHQ[..., nope:], back)
        dkv = torch.cat([dk_BTHQ[..., :nope], dv[..., : ctx.v_head_dim]], -1)
        shared = dk_BTHQ[..., nope:].sum(2, keepdim=True, dtype=torch.float32)
        return dq, dkv, rotate(shared, back).squeeze(2).to(dk_BTHQ.dtype), None, None, None


def attention(q_BHTQ: Tensor, k_BHTQ: Tensor, v_BHTV: Tensor, scale: float, documents_BT: Tensor | None) -> Tensor:
    """Causal softmax(scale q k^T) v, inside each document where documents_BT gives the document of every position.

    Documents are contiguous. Returns (B, H, T, V), V as given. On a CPU each document is its own call (exact, and only
    the flash kernel's work: it needs values as wide as keys, so they are padded); on CUDA documents become a block mask.
    """
    v_width = v_BHTV.size(-1)
    if q_BHTQ.is_cuda:
        if documents_BT is None:
            return F.scaled_dot_product_attention(q_BHTQ, k_BHTQ, v_BHTV, is_causal=True, scale=scale)
        same = documents_BT.unsqueeze(-1) == documents_BT.unsqueeze(-2)
        mask = same.tril_().unsqueeze(1)
        return F.scaled_dot_product_attention(q_BHTQ, k_BHTQ, v_BHTV, attn_mask=mask, scale=scale)
    if v_width < q_BHTQ.size(-1):
        v_BHTV = F.pad(v_BHTV, (0, q_BHTQ.size(-1) - v_width))
    if documents_BT is None:
        out = F.scaled_dot_product_attention(q_BHTQ, k_BHTQ, v_BHTV, is_causal=True, scale=scale)
        return out[..., :v_width]
    rows = []
    for row, lengths in enumerate(_document_lengths(documents_BT)):
        parts = zip(*(t[row : row + 1].split(lengths, 2) for t in (q_BHTQ, k_BHTQ, v_BHTV)), strict=True)
        outs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale) for q, k, v in parts]
        rows.append(torch.cat(outs, 2))
    return torch.cat(rows)[..., :v_width]


def _document_lengths(documents_BT: Tensor) -> list[list[int]]:
    """Tokens of each document, in order, per sequence."""
    return [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in documents_BT]
