"""Defines a transformer block: x += attention(norm(x)); x += ffn(norm(x)). The FFN is dense or a mixture of experts."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from conf.schema import Model, Recompute
from train.model.layers import FFN, LayerPrecision, RMSNorm
from train.model.mla import MLA
from train.model.moe import Dispatcher, MoE
from train.model.offload import Host, OffloadedBlock
from train.model.recompute import repeatable
from train.model.rope import Rope
from train.model.sequence import Positions


class Block(nn.Module):
    """A block of the main model or of an MTP module. It maps x (B, T, D) to an output of the same shape.

    dispatcher: sends tokens to experts; None for a dense block.
    repeat: whether backward runs the complete block again, so that forward saves only the block's input.
    host: stores activations in host memory; None: no offload.
    offload: the part whose activations `host` stores: attention, ffn, or layer for both.
    chooses: whether the block has an indexer.
    positions: None if x contains complete sequences.
    """

    def __init__(
        self,
        config: Model,
        precision: LayerPrecision,
        rope: Rope,
        dispatcher: Dispatcher | None,
        local_experts: range,
        repeat: bool,
        host: Host | None = None,
        offload: str = "",
        chooses: bool = False,
        **factory,
    ):
        super().__init__()
        recompute_norm, kernels = Recompute.norm in config.recompute, precision.kernels
        self.attention_norm = RMSNorm(config.hidden, config.norm_eps, recompute_norm, kernels, **factory)
        self.attention = MLA(config, precision, rope, chooses, **factory)
        self.ffn_norm = RMSNorm(config.hidden, config.norm_eps, recompute_norm, kernels, **factory)
        if dispatcher is None:
            recompute_swiglu = Recompute.swiglu in config.recompute
            self.ffn = FFN(config.hidden, config.dense_width, precision, recompute_swiglu, **factory)
        else:
            self.moe = MoE(config, precision, dispatcher, local_experts, **factory)
        self._is_dense, self._repeat = dispatcher is None, repeat
        self._host, self._offload = host, offload

    def forward(self, x_BTD: Tensor, positions: Positions | None = None) -> Tensor:
        if self._repeat and torch.is_grad_enabled():
            return repeatable(partial(self._run, positions), x_BTD)
        with self._offloaded("layer", x_BTD):
            return self._run(positions, x_BTD)

    def _run(self, positions: Positions | None, x_BTD: Tensor) -> Tensor:
        normed_BTD, remake = self.attention_norm.with_remake(x_BTD)
        with self._offloaded("attention", x_BTD):
            x_BTD = x_BTD + self.attention(normed_BTD, remake, positions)
        normed_BTD, remake = self.ffn_norm.with_remake(x_BTD)
        with self._offloaded("ffn", x_BTD):
            if self._is_dense:
                return x_BTD + self.ffn(normed_BTD.flatten(0, 1), remake).view(x_BTD.shape)
            return x_BTD + self.moe(normed_BTD, remake, positions)

    def _offloaded(self, part: str, x_BTD: Tensor) -> AbstractContextManager:
        """Return the context manager that offloads the activations of `part`. x_BTD: the input of the part."""
        if self._host is None or part != self._offload or not torch.is_grad_enabled():
            return nullcontext()
        return OffloadedBlock(self._host, (x_BTD, *self.parameters(), *self.buffers()))
