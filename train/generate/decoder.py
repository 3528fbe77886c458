"""Runs a model for generation: the modules of train/model, with attention over a cache of latents.

Prompts and single tokens run through the same code.

Shapes: B rows, T new tokens, N = B*T, D width, V vocabulary, H heads, C kv_rank, R rope width, W = C + R, P nope width,
U width of a value.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.errors import UserError
from conf.own_code import TARGET
from conf.schema import Model
from train.generate.cache import LatentCache, Slots, choose_columns, latent_attention
from train.model.block import Block
from train.model.count import indexer_layers
from train.model.deepseek import DeepSeekV3
from train.model.indexer import Indexer, IndexVectors
from train.model.mla import MLA
from train.model.rope import Rope, rotate
from train.model.router import Router


def require_plain_blocks(config: Model) -> None:
    """Raise UserError for the user's own blocks, without importing them."""
    if config.block:
        rule = "does not support generation, which needs the parts of DeepSeek-V3's own block"
        raise UserError(
            f"model.block.{TARGET}", config.block[TARGET], rule, "measure held-out losses instead: mode=evaluate"
        )


class Decoder:
    """A complete model in eval mode that computes with a cache.

    The weights must not change, because the decoder has copies of some. seq_len: sequence length in training, which
    decides whether RoPE uses YaRN.
    """

    def __init__(self, model: DeepSeekV3, seq_len: int):
        assert not model.training, "the routers of a training model count loads"
        require_plain_blocks(model.config)
        self.model, self.config = model, model.config
        self.dtype, self.device = model.norm.weight.dtype, model.norm.weight.device
        self._rope = Rope(model.config, seq_len)
        self.key_tap: KeyTap | None = None
        self._absorbed = {block.attention: self._split_up(block.attention) for block in model.layers.values()}

    def _split_up(self, mla: MLA) -> tuple[Tensor, Tensor]:
        """Return W_UK (H, P, C) and W_UV (H, C, U).

        In bf16, W_UV is a copy, because transposed bf16 matmuls of few tokens are slow on a CPU.
        """
        up_HXC = mla.kv_up.weight.detach().view(self.config.heads, -1, self.config.kv_rank)
        w_uk_HPC, w_uv_HUC = up_HXC.split([self.config.nope_head_dim, self.config.v_head_dim], 1)
        w_uv_HCU = w_uv_HUC.transpose(1, 2)
        return w_uk_HPC, w_uv_HCU.contiguous() if self.dtype == torch.bfloat16 else w_uv_HCU

    def new_cache(self, starts: list[int]) -> LatentCache:
        """Return an empty cache. starts: padding columns of each row."""
        return LatentCache(self.config, starts, self.dtype, self.device)

    def hidden(self, tokens_BT: Tensor, cache: LatentCache) -> Tensor:
        """Return the hidden states (B, T, D), and write uncommitted cache entries."""
        slots = cache.slots(tokens_BT.size(1))
        table = self._rope.table(slots.end, self.device)[slots.positions_N()]  # complex (N, R/2)
        x_BTD = F.embedding(tokens_BT, self.model.embedding.weight)
        for layer, block in enumerate(self.model.layers.values()):
            x_BTD = self._block(block, x_BTD, cache, layer, slots, table)
        return self.model.norm(x_BTD)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits, fp32 (..., V), of hidden states (..., D)."""
        return F.linear(hidden, self.model.head.weight).float()

    def _block(
        self, block: Block, x_BTD: Tensor, cache: LatentCache, layer: int, slots: Slots, table: Tensor
    ) -> Tensor:
        x_BTD = x_BTD + self._attend(block.attention, block.attention_norm(x_BTD), cache, layer, slots, table)
        normed_BTD = block.ffn_norm(x_BTD)
        if hasattr(block, "moe"):
            return x_BTD + block.moe(normed_BTD, nullcontext())
        return x_BTD + block.ffn(normed_BTD.flatten(0, 1), nullcontext()).view(x_BTD.shape)

    def _choose(
        self,
        indexer: Indexer,
        x_BTD: Tensor,
        q_latent: Tensor,
        cache: LatentCache,
        layer: int,
        slots: Slots,
        table: Tensor,
    ) -> None:
        """Choose the columns that this layer attends to.

        Later layers use them too, up to the next layer with an indexer.
        """
        x_1ND, latent_1NC = (t.flatten(0, 1).unsqueeze(0) for t in (x_BTD, q_latent))
        q, k, w = (t.view(*x_BTD.shape[:2], *t.shape[2:]) for t in indexer(x_1ND, latent_1NC, table))
        keys_BSI, top_k = cache.write_index(layer, slots, k), self.config.sparse.top_k
        if slots.end <= top_k:
            return
        if self.key_tap is not None and self.key_tap.given_TLK is not None:
            slots.choices.chosen_BTK = self.key_tap.given_TLK[None, :, indexer.layer].to(self.device)
        else:
            slots.choices.chosen_BTK = choose_columns(IndexVectors(q, keys_BSI, w), top_k, slots)
        if self.key_tap is not None:
            self.key_tap.chosen.append(slots.choices.chosen_BTK[0].cpu())

    def _attend(self, mla: MLA, x_BTD: Tensor, cache: LatentCache, layer: int, slots: Slots, table: Tensor) -> Tensor:
        config = self.config
        batch, length, _ = x_BTD.shape
        if config.q_rank is None:
            q = mla.q(x_BTD)
        else:
            q_latent = mla.q_norm(mla.q_down(x_BTD))
            q = mla.q_up(q_latent)
            if mla.indexer is not None:
                self._choose(mla.indexer, x_BTD, q_latent, cache, layer, slots, table)
        latent_BTC, k_rope_BTR = mla.kv_down(x_BTD).split([config.kv_rank, config.rope_head_dim], -1)
        q = self._rope.grow(q.view(batch * length, -1), slots.positions_N())
        q_nope_NHP, q_rope_NHR = q.view(batch * length, config.heads, -1).split(
            [config.nope_head_dim, config.rope_head_dim], -1
        )
        # The rope key is rotated together with the queries, as one more head.
        ropes = torch.cat([q_rope_NHR, k_rope_BTR.reshape(batch * length, 1, -1)], 1)
        ropes = rotate(ropes.unsqueeze(0), table).to(self.dtype).view(batch, length, config.heads + 1, -1)
        entries_BSW = cache.write(layer, slots, torch.cat([mla.kv_norm(latent_BTC), ropes[:, :, -1]], -1))

        w_uk_HPC, w_uv_HCU = self._absorbed[mla]
        q_latent_HNC = torch.bmm(q_nope_NHP.transpose(0, 1), w_uk_HPC)
        q_latent_BTHC = q_latent_HNC.transpose(0, 1).view(batch, length, config.heads, -1)
        q_BTHW = torch.cat([q_latent_BTHC, ropes[:, :, :-1]], -1)
        sums_BTHC = latent_attention(q_BTHW, entries_BSW, config.kv_rank, self._rope.softmax_scale, slots)
        values_HNU = torch.bmm(sums_BTHC.flatten(0, 1).transpose(0, 1), w_uv_HCU)
        return mla.out(values_HNU.transpose(0, 1).reshape(batch, length, -1))


class KeyTap:
    """Records or replaces the indexers' key positions for one sample."""

    def __init__(self, decoder: Decoder):
        self.given_TLK: Tensor | None = None
        """Key positions for the next forward pass, int32, padded with -1; None: the indexers choose."""
        self.chosen: list[Tensor] = []
        self.shape = indexer_layers(decoder.config), decoder.config.sparse.top_k
        """Number of layers with an indexer, and keys per token."""
        decoder.key_tap = self

    def take(self) -> list | None:
        """Return the key positions of the last forward pass; None if the text has at most top_k tokens."""
        chosen, self.chosen = self.chosen, []
        if not chosen:
            return None
        return [[[key for key in keys if key >= 0] for keys in layers] for layers in torch.stack(chosen, 1).tolist()]


# RoutingTap records each token's experts, or replays the experts that an inference engine chose.
#
# An inference engine and Sluice round differently, so a token with nearly equal scores can go to other experts here.
# Then log-probabilities differ by more than rounding. Replay uses the engine's experts, with gate values from this
# model's scores.
#
# Shapes: B = 1 sample, T positions (all tokens but the last), L MoE layers of the main model in order, K = top_k, D
# width.


class RoutingTap:
    """Records or replaces the experts that MoE layers choose."""

    def __init__(self, model: DeepSeekV3):
        """model: the complete model of a decoder, in eval mode."""
        self.given_TLK: Tensor | None = None
        """Experts for the next forward pass, int64; None: routers choose."""
        self._chosen: list[Tensor] = []
        routers = [block.moe.router for block in model.layers.values() if hasattr(block, "moe")]
        self.shape = (len(routers), model.config.top_k, model.config.experts)
        """Number of MoE layers, experts per token, and experts per layer."""
        self._hooks = [router.register_forward_hook(self._hook(number)) for number, router in enumerate(routers)]

    def close(self) -> None:
        """Stop recording."""
        for hook in self._hooks:
            hook.remove()

    def take(self) -> Tensor:
        """Return the experts of the last forward pass, (T, L, K), including padding."""
        chosen, self._chosen = self._chosen, []
        return torch.stack(chosen, 1)

    def _hook(self, number: int) -> Any:
        def hook(router: Router, inputs: tuple, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            if self.given_TLK is not None:
                ids_TK = self.given_TLK[:, number]
                output = gates_of(router, inputs[0], ids_TK), ids_TK
            self._chosen.append(output[1])
            return output

        return hook


def gates_of(router: Router, x_BTD: Tensor, ids_TK: Tensor) -> Tensor:
    """Return the gate values of these experts, fp32 (B*T, K)."""
    logits_TE = router.score(x_BTD, nullcontext()).flatten(0, 1)
    scores_TE = logits_TE.softmax(-1) if router.rule.softmax else logits_TE.sigmoid()
    chosen_TK = scores_TE.gather(-1, ids_TK)
    return chosen_TK * (router.rule.route_scale / (chosen_TK.sum(-1, keepdim=True) + 1e-20))
