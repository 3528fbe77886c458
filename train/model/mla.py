"""Multi-head latent attention (paper 2.1.1, eq. 1-11), training form: keys and values are computed for every head.

    c_Q  = norm(W_DQ x)            q = [W_UQ c_Q ; RoPE(W_QR c_Q)]      per head
    c_KV = norm(W_DKV x)           k = [W_UK c_KV ; RoPE(W_KR x)]       all heads share the rope key
                                   v =  W_UV c_KV
    y = W_O softmax(scale q k^T) v

q_down, q_up, kv_down, kv_up and out hold the W's, packed as in the released weights: kv_down gives [c_KV | rope key],
q_up per head [nope | rope], kv_up per head [nope key | value]. Without q_rank, `q` projects x directly.

Shapes: B sequences, T positions, D width, H heads, Q qk width = nope + rope, R rope width, V value width.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from conf.schema import Model, Recompute
from train.model.attention import AttentionInput, LargestScores
from train.model.layers import LayerPrecision, Linear, RMSNorm
from train.model.recompute import RecomputedOutputs, ReplaceableTensors
from train.model.rope import Rope, rotate, turn_queries
from train.model.sequence import Positions
from train.model.shared_attention import KeysOfLatents, SharedAttention


class MLA(nn.Module):
    """Multi-head latent attention of one block."""

    def __init__(self, config: Model, precision: LayerPrecision, rope: Rope, **factory):
        super().__init__()
        width, heads = config.hidden, config.heads
        qk_width = config.nope_head_dim + config.rope_head_dim
        recompute_norm, kernels = Recompute.norm in config.recompute, precision.kernels
        if config.q_rank is None:
            self.q = Linear(width, heads * qk_width, precision, **factory)
        else:
            self.q_down = Linear(width, config.q_rank, precision, **factory)
            self.q_norm = RMSNorm(config.q_rank, config.resolved_latent_norm_eps, recompute_norm, kernels, **factory)
            self.q_up = Linear(config.q_rank, heads * qk_width, precision, **factory)
        self.kv_down = Linear(width, config.kv_rank + config.rope_head_dim, precision, **factory)
        self.kv_norm = RMSNorm(config.kv_rank, config.resolved_latent_norm_eps, recompute_norm, kernels, **factory)
        self.kv_up = Linear(config.kv_rank, heads * (config.nope_head_dim + config.v_head_dim), precision, **factory)
        self.out = Linear(heads * config.v_head_dim, width, precision, kind="output", **factory)
        self._config, self._rope, self._kernels = config, rope, kernels
        self._recompute_up = Recompute.mla_up in config.recompute
        self.watch: LargestScores | None = None
        """Records the largest scores in training; None if they are not needed."""

    def forward(self, x_BTD: Tensor, remake: AbstractContextManager, positions: Positions | None = None) -> Tensor:
        """remake: the context in which saving x costs nothing (`RMSNorm.with_remake`).

        positions: those of x; None for all positions of whole sequences. Returns (B, T, D).
        """
        positions = positions or Positions(x_BTD.size(1))
        with remake:
            # q_latent is the whole query if queries are not compressed
            q_latent = self.q(x_BTD) if self._config.q_rank is None else self.q_down(x_BTD)
            kv_latent, k_rope_BTR = self.kv_down(x_BTD).split([self._config.kv_rank, self._config.rope_head_dim], -1)
        saved = ReplaceableTensors()
        if positions.share is not None:
            return self._project(self._attend_shared(positions, q_latent, kv_latent, k_rope_BTR, saved), saved)
        heads = self._up(q_latent, kv_latent, k_rope_BTR)
        keep = nullcontext()
        if self._recompute_up and torch.is_grad_enabled():
            keep = RecomputedOutputs(self._up, (q_latent, kv_latent, k_rope_BTR), *heads)
        with saved, keep:
            out_BHTV = self.attend(AttentionInput(*heads, self._rope.softmax_scale, positions.seen[0], self.watch))
        return self._project(out_BHTV, saved)

    def attend(self, given: AttentionInput) -> Tensor:
        """Run only the attention core, for sequences that no other rank shares: (B, H, T, V)."""
        return self._kernels.attention(given)

    def _project(self, out_BHTV: Tensor, saved: ReplaceableTensors) -> Tensor:
        """Return (B, T, D).

        If the projection keeps its input in fewer bits, attention's backward reads that copy too. saved: the tensors
        that attention saved, in some kernels including its output.
        """
        x_BTX = out_BHTV.transpose(1, 2).flatten(2)
        held, heads = self.out.hold(x_BTX), out_BHTV.size(1)
        if held is not None:
            values = held.values  # the tensors may be moved in the meantime
            saved.replace(
                out_BHTV, lambda *kept: values(*kept).unflatten(-1, (heads, -1)).transpose(1, 2), *held.tensors
            )
        return self.out(x_BTX, held)

    def _up(self, q_latent: Tensor, kv_latent: Tensor, k_rope_BTR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys (B, H, T, Q) and values (B, H, T, V) from the latents."""
        config = self._config
        q_latent = self._up_queries(q_latent, [range(q_latent.size(1))])
        kv_latent, remake = self.kv_norm.with_remake(kv_latent)
        with remake:
            kv = self.kv_up(kv_latent)
        table = self._rope.table(q_latent.size(1), q_latent.device)
        q, kv = (t.unflatten(-1, (config.heads, -1)) for t in (q_latent, kv))
        return self._kernels.to_heads(q, kv, k_rope_BTR, table, config.nope_head_dim)

    def _up_queries(self, q_latent: Tensor, pieces: Sequence[range]) -> Tensor:
        """Return (B, T, H * Q), which the caller may overwrite; without compression q_latent already is the query.
        pieces: their positions.
        """
        if self._config.q_rank is None:
            q = q_latent.clone() if self._recompute_up else q_latent  # backward calls this again with the same tensor
        else:
            q_latent, remake = self.q_norm.with_remake(q_latent)
            with remake:
                q = self.q_up(q_latent)
        if not self._rope.grows:
            return q
        return self._rope.grow(
            q, torch.cat([torch.arange(piece.start, piece.stop, device=q.device) for piece in pieces])
        )

    def _attend_shared(
        self, positions: Positions, q_latent: Tensor, kv_latent: Tensor, k_rope_BTR: Tensor, saved: ReplaceableTensors
    ) -> Tensor:
        """Return (B, H, T, V) if other ranks have the rest of the sequences: normed latents and rotated rope keys
        travel, once.
        """
        config, table = self._config, self._rope.table(positions.whole_length, q_latent.device)
        table = torch.cat([table[piece.start : piece.stop] for piece in positions.here])

        def to_travel(kv_latent: Tensor, k_rope_BTR: Tensor) -> Tensor:
            turned = rotate(k_rope_BTR.unsqueeze(2), table).squeeze(2).to(k_rope_BTR.dtype)
            return torch.cat([self.kv_norm(kv_latent), turned], -1)

        def queries(q_latent: Tensor) -> Tensor:
            return turn_queries(
                self._up_queries(q_latent, positions.here).unflatten(-1, (config.heads, -1)),
                table,
                config.nope_head_dim,
            )

        latents_BTX = to_travel(kv_latent, k_rope_BTR)
        assert positions.share is not None
        gathering = positions.share.gather_begin(latents_BTX.detach(), [len(piece) for piece in positions.pieces])
        q_BHTQ = queries(q_latent)
        keep = nullcontext()
        if self._recompute_up and torch.is_grad_enabled():
            sources = q_latent, kv_latent, k_rope_BTR
            keep = RecomputedOutputs(lambda q, *others: (queries(q), to_travel(*others)), sources, q_BHTQ, latents_BTX)
        keys = KeysOfLatents(self.kv_up, config.heads, config.kv_rank, config.nope_head_dim)
        with saved, keep:
            return SharedAttention.apply(
                q_BHTQ,
                latents_BTX,
                keys,
                self._kernels.core,
                self._rope.softmax_scale,
                positions,
                gathering,
                self.watch,
                *(weight for weight in self.kv_up.parameters() if weight.requires_grad),
            )
