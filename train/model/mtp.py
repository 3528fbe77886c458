"""Multi-token prediction (paper 2.2, eq. 21-25).

Depth k predicts the token k+1 positions ahead. At position i it combines the embedding of token i+k with the hidden
state of depth k-1, which depends on the tokens up to i+k-1:

    h_k[i] = norm( block( W [ norm(Emb(t[i+k])) ; norm(h_(k-1)[i]) ] ) ),   i = 1 .. T-k

h_0 is the main model's output after its final norm. Each depth passes its normed output to the next depth; the paper
does not specify this norm. No tensor is detached from the graph. MTP depths share the embedding and the head with the
main model.

Shapes: B sequences, T positions of this depth, D width.
"""

import torch
from torch import Tensor, nn

from conf.own_code import subclass
from conf.schema import Model, Recompute
from train.model.block import Block
from train.model.layers import LayerPrecision, Linear, RMSNorm
from train.model.moe import Dispatcher
from train.model.rope import Rope
from train.model.sequence import Positions


class MTP(nn.Module):
    """The module of one MTP depth."""

    def __init__(
        self,
        config: Model,
        precision: LayerPrecision,
        rope: Rope,
        dispatcher: Dispatcher,
        local_experts: range,
        **factory,
    ):
        super().__init__()
        recompute, kernels = Recompute.norm in config.recompute, precision.kernels
        repeat = Recompute.layer in config.recompute
        self.embedding_norm = RMSNorm(config.hidden, config.norm_eps, recompute, kernels, **factory)
        self.hidden_norm = RMSNorm(config.hidden, config.norm_eps, recompute, kernels, **factory)
        self.projection = Linear(2 * config.hidden, config.hidden, precision, **factory)
        block = subclass("model.block", config.block, Block)
        more = {"chooses": True} if config.sparse.chooses(None) else {}
        self.block = block(config, precision, rope, dispatcher, local_experts, repeat, **more, **factory)
        self.norm = RMSNorm(config.hidden, config.norm_eps, recompute, kernels, **factory)

    def forward(self, hidden_BTD: Tensor, embedding_BTD: Tensor, positions: Positions) -> Tensor:
        """Return the normed hidden states of this depth, for the shared head and the next depth.

        hidden_BTD: states of the previous depth, without its last position.
        embedding_BTD: embeddings of the tokens k positions later, at depth k.
        """
        joined = torch.cat([self.embedding_norm(embedding_BTD), self.hidden_norm(hidden_BTD)], -1)
        return self.norm(self.block(self.projection(joined), positions))
