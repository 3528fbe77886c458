"""Estimates the messages of each token between expert-parallel ranks, and their bytes.

The router's rule (paper 2.1.2), applied to random scores, gives the nodes and ranks that receive a token. A message is
a row in the wire format, gates, and in some dispatchers expert ids.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from conf.dispatches import Reach
from conf.schema import Config, Model
from parallel.expert.wire import TILE
from parallel.layout import Layout

SAMPLES = 4096
"""Number of random tokens that estimate the messages per token, with a standard error below 0.5 %."""


@dataclass(frozen=True)
class Spread:
    """Expected messages of a token in an expert layer, and their bytes."""

    ranks: int
    """Number of ranks in the expert group."""
    copies: tuple[float, ...]
    """Number of rows per token that kernels copy in each hop of the exchange; see `Messages` in conf/dispatches.py."""
    arrivals: float
    """Rows that arrive at experts, per token of a rank."""
    row_bytes: int
    """Bytes per dispatched row in forward, with gates and expert ids."""
    gradient_bytes: int
    """Bytes per dispatched row in backward."""
    high_bytes: int
    """Bytes per combined row in forward, in the activation dtype."""
    high_gradient_bytes: int
    """Bytes per combined row in backward, with the gradient of the row's gate value."""
    inside: float
    """Messages of a token to other ranks of its node."""
    across: float
    """Messages of a token to other nodes."""

    def step_bytes(self, tokens: float) -> tuple[float, float]:
        """Returns the bytes that an expert layer sends inside nodes, and across nodes.

        tokens: number of tokens of the layer. Forward and backward count.
        """
        row = self.row_bytes + self.gradient_bytes + self.high_bytes + self.high_gradient_bytes
        return tokens * self.inside * row, tokens * self.across * row


def spread_of(config: Config, layout: Layout) -> Spread:
    """Returns the expected messages per token, with their bytes."""
    model, element = config.model, config.precision.weight_bytes
    if layout.ep == 1:
        return Spread(1, (), 1.0, 0, 0, 0, 0, 0.0, 0.0)
    per_node = layout.ep_ranks_per_node
    high = _round_up(model.hidden * element, 4)
    coded = high if config.parallel.wire == "bf16" else _round_up(model.hidden + -(-model.hidden // TILE), 4)
    dispatch = config.parallel.dispatch_facts
    sent = dispatch.count_messages(Reach(*reached(model, layout.ep // per_node, per_node), layout.ep, per_node))
    row, gates = coded + dispatch.side_bytes(model.top_k), dispatch.gate_bytes(model.top_k)
    return Spread(layout.ep, sent.copies, sent.arrivals, row, coded, high, high + gates, sent.inside, sent.across)


def latent_bytes(config: Config) -> int:
    """Returns a rank's bytes per micro-batch to gather a layer's latents over context-parallel ranks.

    Each layer needs two gathers, and a scatter of equal size (parallel/context.py).
    """
    model, cp = config.model, config.parallel.cp
    own = config.micro_batch_size * config.seq_len // cp
    return (cp - 1) * own * (model.kv_rank + model.rope_head_dim) * config.precision.weight_bytes


@cache
def _chosen(experts: int, top_k: int, groups: int, top_groups: int, group_top_k: int) -> np.ndarray:
    """Routes tokens with random scores. Returns expert ids (SAMPLES, top_k)."""
    scores_SE = np.random.default_rng(0).random((SAMPLES, experts), dtype=np.float32)
    if top_groups < groups:
        grouped_SGX = scores_SE.reshape(SAMPLES, groups, -1)
        best = np.sort(grouped_SGX, -1)[..., -group_top_k:].sum(-1)
        closed_SG = np.argsort(np.argsort(-best, -1), -1) >= top_groups
        scores_SE = np.where(closed_SG[..., None], -1.0, grouped_SGX).reshape(SAMPLES, experts)
    return np.argpartition(-scores_SE, top_k - 1, -1)[:, :top_k]


def reached(model: Model, nodes: int, per_node: int) -> tuple[float, float, int]:
    """Returns, for one token, the expected number of nodes and of ranks with its experts, and top_k."""
    rule = model.experts, model.top_k, model.groups, model.top_groups, model.resolved_group_top_k
    return _distinct(nodes, *rule), _distinct(nodes * per_node, *rule), model.top_k


@cache
def _distinct(holders: int, experts: int, *rule: int) -> float:
    """Returns the expected number of holders (ranks or nodes) with any of a token's experts."""
    hit_SH = np.zeros((SAMPLES, holders), dtype=bool)
    np.put_along_axis(hit_SH, _chosen(experts, *rule) // (experts // holders), True, 1)
    return float(hit_SH.sum(1).mean())


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
