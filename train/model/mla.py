"""Multi-head latent attention (paper 2.1.1, eq. 1-11), training form: keys and values are computed for every head.

    c_Q  = norm(W_DQ x)            q = [W_UQ c_Q ; RoPE(W_QR c_Q)]      per head
    c_KV = norm(W_DKV x)           k = [W_UK c_KV ; RoPE(W_KR x)]       all heads share the rope key
                                   v =  W_UV c_KV
    y = W_O softmax(scale q k^T) v

The matrices W are packed in q_down, q_up, kv_down, kv_up and out, as in the released weights. kv_down computes [c_KV |
rope key]. For each head, q_up computes [nope | rope], and kv_up computes [nope key | value]. If q_rank is None, the
matrix `q` computes the queries from x directly.

With sparse attention, a query attends to the keys that an indexer of this or an earlier layer chooses (indexer.py).
chosen_attention.py then computes attention directly from the latents.

Shapes: B sequences, T positions, D width, H heads, Q qk width = nope + rope, R rope width, V value width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from conf.schema import Model, Recompute
from train.model.attention import AttentionInput, KeptLse, LargestScores
from train.model.chosen_attention import ChosenAttention, KeptShares
from train.model.indexer import (
    AttentionTarget,
    Indexer,
    IndexLoss,
    IndexVectors,
    Learn,
    learn,
    query_weights,
    whole_keys,
)
from train.model.layers import LayerPrecision, Linear, RMSNorm
from train.model.recompute import RecomputedOutputs, ReplaceableTensors, is_repeated, recall, remember
from train.model.rope import Rope, rotate, turn_queries
from train.model.sequence import Positions, SeenKeys
from train.model.shared_attention import KeysOfLatents, SharedAttention


class MLA(nn.Module):
    """Multi-head latent attention of one block."""

    def __init__(self, config: Model, precision: LayerPrecision, rope: Rope, chooses: bool = False, **factory):
        """chooses: whether this layer has an indexer."""
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
        self.indexer = Indexer(config, precision, **factory) if chooses else None
        self._config, self._rope, self._kernels = config, rope, kernels
        self._recompute_up = Recompute.mla_up in config.recompute
        self.watch: LargestScores | None = None
        """Records the largest scores in training; None if not needed."""

    def forward(self, x_BTD: Tensor, remake: AbstractContextManager, positions: Positions | None = None) -> Tensor:
        """Return the output of attention, (B, T, D).

        remake: context manager inside which autograd does not save x; backward recomputes x (`RMSNorm.with_remake`).
        positions: the positions of x; None: x contains complete sequences.
        """
        positions = positions or Positions(x_BTD.size(1))
        with remake:
            # If the model has no q_rank, q_latent is the complete query.
            q_latent = self.q(x_BTD) if self._config.q_rank is None else self.q_down(x_BTD)
            kv_latent, k_rope_BTR = self.kv_down(x_BTD).split([self._config.kv_rank, self._config.rope_head_dim], -1)
        saved = ReplaceableTensors()
        index, chosen_BTK = self._choose(x_BTD, q_latent, remake, positions)
        lse = KeptLse() if index is not None else None
        shares = KeptShares() if index is not None and chosen_BTK is not None else None
        if positions.share is not None or chosen_BTK is not None:
            out_BHTV, q_BHTQ, blocks = self._attend_latents(
                positions, q_latent, kv_latent, k_rope_BTR, saved, chosen_BTK, lse, shares
            )
        else:
            q_BHTQ, k_BHTQ, v_BHTV = heads = self._up(q_latent, kv_latent, k_rope_BTR)
            keep = nullcontext()
            if self._recompute_up and torch.is_grad_enabled():
                keep = RecomputedOutputs(self._up, (q_latent, kv_latent, k_rope_BTR), *heads)
            scale, seen = self._rope.softmax_scale, positions.seen[0]
            with saved, keep:
                out_BHTV = self.attend(AttentionInput(q_BHTQ, k_BHTQ, v_BHTV, scale, seen, self.watch, lse))

            def blocks() -> Iterator[tuple[Tensor, SeenKeys, int]]:
                yield k_BHTQ.detach(), seen, 0

        y_BTD = self._project(out_BHTV, saved)
        if index is None or lse is None:
            return y_BTD
        if chosen_BTK is not None and shares is not None:
            given = {"chosen_BTK": chosen_BTK, "shares_BTK": shares.shares_BTK}
            return self._learn(y_BTD, index, positions, partial(self._kernels.chosen_index_loss, **given))
        target = AttentionTarget(q_BHTQ.detach(), lse.lse_BHT, self._rope.softmax_scale, blocks)
        loss_of = partial(self._kernels.index_loss, seen=positions.seen_whole, target=target)
        return self._learn(y_BTD, index, positions, loss_of)

    def _choose(
        self, x_BTD: Tensor, q_latent: Tensor, remake: AbstractContextManager, positions: Positions
    ) -> tuple[IndexVectors | None, Tensor | None]:
        """Return the indexer's vectors, and the keys that each local query attends to.

        The vectors are None if this layer's indexer does not learn. The chosen keys are None if every query attends to
        all its visible keys.
        """
        sparse, choices = self._config.sparse, positions.choices
        learns = self.indexer is not None and self.training and choices.weight > 0
        is_dense = not sparse.heads or positions.length <= sparse.top_k or (self.training and choices.alone is not None)
        chosen_BTK = None if is_dense else recall()
        index = None
        if self.indexer is not None and (learns or not (is_dense or chosen_BTK is not None)):
            with torch.set_grad_enabled(learns):
                index = self._index(self.indexer, x_BTD.detach(), q_latent.detach(), remake, positions)
        if is_dense or chosen_BTK is not None:
            return index if learns else None, chosen_BTK
        if self.indexer is not None and self.indexer.layer is not None and positions.keys_BTLK is not None:
            choices.chosen_BTK = positions.take(positions.keys_BTLK[:, :, self.indexer.layer]).to(x_BTD.device)
        elif index is not None:
            whole = index._replace(k_BSI=whole_keys(positions, index.k_BSI.detach()))
            with torch.no_grad():
                choices.chosen_BTK = self._kernels.choose_keys(whole, positions.seen_whole, sparse.top_k)
        assert choices.chosen_BTK is not None, "the first layer of a chunk chooses"
        return index if learns else None, remember(choices.chosen_BTK)

    def _index(
        self,
        indexer: Indexer,
        x_BTD: Tensor,
        q_latent: Tensor,
        remake: AbstractContextManager,
        positions: Positions,
    ) -> IndexVectors:
        table = self._local_table(positions, x_BTD.device)
        latent, remake_latent = self.q_norm.with_remake(q_latent)
        return indexer(x_BTD, latent.detach(), table, remake, remake_latent)

    def _learn(
        self,
        y_BTD: Tensor,
        index: IndexVectors,
        positions: Positions,
        loss_of: Callable[..., IndexLoss],
    ) -> Tensor:
        """Return y. Its backward also computes the gradient of the indexer's loss.

        loss_of: computes the indexer's loss from the vectors of all keys and the weight of each query.
        """
        indexer, alone = self.indexer, positions.choices.alone
        assert indexer is not None, "who learns"

        def compute(vectors: IndexVectors) -> IndexLoss:
            return learn(vectors, query_weights(positions, len(y_BTD), y_BTD.device), positions, loss_of)

        def count(loss: Tensor) -> None:
            if not is_repeated():
                indexer.loss = indexer.loss + loss

        if alone is None:
            return Learn.apply(y_BTD, *index, compute, count)
        loss, gradients = compute(index)
        count(loss)
        weights = list(indexer.parameters())
        alone.update(zip(weights, torch.autograd.grad(index, weights, gradients), strict=True))
        return y_BTD

    def attend(self, given: AttentionInput) -> Tensor:
        """Run only the attention core, for complete sequences. Returns (B, H, T, V)."""
        return self._kernels.attention(given)

    def _project(self, out_BHTV: Tensor, saved: ReplaceableTensors) -> Tensor:
        """Apply the output projection to attention's output. Returns a tensor (B, T, D).

        saved: the tensors that attention saved for backward. If the projection saves its input in fewer bits, attention
            saves this copy instead of its output.
        """
        x_BTX = out_BHTV.transpose(1, 2).flatten(2)
        held, heads = self.out.hold(x_BTX), out_BHTV.size(1)
        if held is not None:
            values = held.values  # so that the function below does not keep held.tensors in memory
            saved.replace(
                out_BHTV, lambda *kept: values(*kept).unflatten(-1, (heads, -1)).transpose(1, 2), *held.tensors
            )
        return self.out(x_BTX, held)

    def _up(self, q_latent: Tensor, kv_latent: Tensor, k_rope_BTR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries (B, H, T, Q), keys (B, H, T, Q) and values (B, H, T, V) from latents."""
        config = self._config
        q_latent = self._up_queries(q_latent, [range(q_latent.size(1))])
        kv_latent, remake = self.kv_norm.with_remake(kv_latent)
        with remake:
            kv = self.kv_up(kv_latent)
        table = self._rope.table(q_latent.size(1), q_latent.device)
        q, kv = (t.unflatten(-1, (config.heads, -1)) for t in (q_latent, kv))
        return self._kernels.to_heads(q, kv, k_rope_BTR, table, config.nope_head_dim)

    def _up_queries(self, q_latent: Tensor, pieces: Sequence[range]) -> Tensor:
        """Return queries (B, T, H * Q), which the caller may overwrite. Without q_rank, q_latent is already the query.

        pieces: ranges of the queries' positions.
        """
        if self._config.q_rank is None:
            q = q_latent.clone() if self._recompute_up else q_latent  # backward calls this method again with q_latent
        else:
            q_latent, remake = self.q_norm.with_remake(q_latent)
            with remake:
                q = self.q_up(q_latent)
        if not self._rope.grows:
            return q
        return self._rope.grow(
            q, torch.cat([torch.arange(piece.start, piece.stop, device=q.device) for piece in pieces])
        )

    def _local_table(self, positions: Positions, device: torch.device) -> Tensor:
        """Return the RoPE table of the local positions."""
        table = self._rope.table(positions.whole_length, device)
        return torch.cat([table[piece.start : piece.stop] for piece in positions.here])

    def _attend_latents(
        self,
        positions: Positions,
        q_latent: Tensor,
        kv_latent: Tensor,
        k_rope_BTR: Tensor,
        saved: ReplaceableTensors,
        chosen_BTK: Tensor | None,
        lse: KeptLse | None,
        shares: KeptShares | None,
    ) -> tuple[Tensor, Tensor, Callable[[], Iterator[tuple[Tensor, SeenKeys, int]]]]:
        """Compute attention for this rank's queries, if ranks share sequences or if attention is sparse.

        If ranks share sequences, one gather fetches the normed latents and rotated rope keys of all positions.

        Returns the output (B, H, T, V), the queries, and a function that gathers the latents again and iterates over
        the keys of all positions. `AttentionTarget` takes the queries and the function.
        """
        config, table = self._config, self._local_table(positions, q_latent.device)

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
        share, rows = positions.share, [len(piece) for piece in positions.pieces]
        gathering = None if share is None else share.gather_begin(latents_BTX.detach(), rows)
        q_BHTQ = queries(q_latent)
        keep = nullcontext()
        if self._recompute_up and torch.is_grad_enabled():
            sources = q_latent, kv_latent, k_rope_BTR
            keep = RecomputedOutputs(lambda q, *others: (queries(q), to_travel(*others)), sources, q_BHTQ, latents_BTX)
        keys = KeysOfLatents(self.kv_up, config.heads, config.kv_rank, config.nope_head_dim)
        scale, kernels = self._rope.softmax_scale, self._kernels
        if chosen_BTK is not None:
            weight_YC, keep_weight = self.kv_up.values()
            with saved, keep, keep_weight:
                out_BHTV = ChosenAttention.apply(
                    q_BHTQ.transpose(1, 2),
                    latents_BTX,
                    weight_YC,
                    chosen_BTK,
                    config.nope_head_dim,
                    scale,
                    kernels,
                    positions,
                    gathering,
                    self.watch,
                    shares,
                )
        else:
            weights = (weight for weight in self.kv_up.parameters() if weight.requires_grad)
            with saved, keep:
                out_BHTV = SharedAttention.apply(
                    q_BHTQ, latents_BTX, keys, kernels.core, scale, positions, gathering, self.watch, lse, *weights
                )

        def blocks() -> Iterator[tuple[Tensor, SeenKeys, int]]:
            assert share is not None
            again = share.gather_begin(latents_BTX.detach(), rows).wait()
            for piece, seen, latents_BLX in zip(positions.pieces, positions.seen, again, strict=True):
                if seen.rectangles:
                    yield keys.of(latents_BLX)[0], seen, piece.start

        return out_BHTV, q_BHTQ, blocks
