"""Estimates how many messages each token causes between expert-parallel ranks, and how many bytes they have.

With balanced routing, all experts are equally likely. To count the nodes, ranks and experts that receive a token, the
router's rule (paper 2.1.2) is applied to random scores. A message is a row in the wire format and the data
sent with it: gates, and in some dispatchers expert ids.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from conf.dispatches import Reach
from conf.schema import Config, Model
from parallel.expert.wire import TILE
from parallel.layout import Layout

SAMPLES = 4096
"""Number of random tokens. The standard error of a mean number of messages is below 0.5 %."""


@dataclass(frozen=True)
class Spread:
    """Expected messages of a token in one layer of experts (means over tokens), and the bytes of each kind of
    message."""

    ranks: int
    """Number of ranks in the expert group."""
    copies: tuple[float, ...]
    """Copies of rows that kernels make in addition to the exchange; see `Messages` in conf/dispatches.py."""
    arrivals: float
    """Number of rows that arrive at the ranks of the experts, per token of a rank."""
    row_bytes: int
    """Bytes of a dispatch message in forward: a row in the wire format, and the gates and expert ids sent with it."""
    gradient_bytes: int
    """Bytes of a dispatch message in backward: only a row in the wire format."""
    high_bytes: int
    """Bytes of a combine message in forward: a row in the activation dtype."""
    high_gradient_bytes: int
    """Bytes of a combine message in backward: a row in the activation dtype, and its gates' gradients."""
    inside: float
    """Number of messages of a token to other ranks of the same node."""
    across: float
    """Number of messages of a token to other nodes."""

    def step_bytes(self, tokens: float) -> tuple[float, float]:
        """Returns the bytes that one layer of experts sends inside nodes, and those that it sends across nodes, in
        forward and backward together. tokens: number of tokens of the layer."""
        row = self.row_bytes + self.gradient_bytes + self.high_bytes + self.high_gradient_bytes
        return tokens * self.inside * row, tokens * self.across * row


def spread_of(config: Config, layout: Layout) -> Spread:
    """Returns the expected messages per token in a layout, and the bytes of each kind of message."""
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
    """Returns the bytes that a rank sends per micro-batch to gather a layer's latents over context-parallel ranks, or
    to scatter their gradients. Each layer needs two gathers and one scatter (parallel/context.py)."""
    model, cp = config.model, config.parallel.cp
    own = config.micro_batch_size * config.seq_len // cp
    return (cp - 1) * own * (model.kv_rank + model.rope_head_dim) * config.precision.weight_bytes


@cache
def _chosen(experts: int, top_k: int, groups: int, top_groups: int, group_top_k: int) -> np.ndarray:
    """Applies the router's rule to random scores. Returns expert ids (SAMPLES, top_k)."""
    scores_SE = np.random.default_rng(0).random((SAMPLES, experts), dtype=np.float32)
    if top_groups < groups:
        grouped_SGX = scores_SE.reshape(SAMPLES, groups, -1)
        best = np.sort(grouped_SGX, -1)[..., -group_top_k:].sum(-1)
        closed_SG = np.argsort(np.argsort(-best, -1), -1) >= top_groups
        scores_SE = np.where(closed_SG[..., None], -1.0, grouped_SGX).reshape(SAMPLES, experts)
    return np.argpartition(-scores_SE, top_k - 1, -1)[:, :top_k]


def reached(model: Model, nodes: int, per_node: int) -> tuple[float, float, int]:
    """Returns three numbers for a token: the expected number of nodes with its experts, the expected number of ranks
    with its experts, and its number of experts. Each rank has experts with consecutive ids."""
    rule = model.experts, model.top_k, model.groups, model.top_groups, model.resolved_group_top_k
    return _distinct(nodes, *rule), _distinct(nodes * per_node, *rule), model.top_k


@cache
def _distinct(holders: int, experts: int, *rule: int) -> float:
    """Returns the expected number of holders (ranks or nodes) with at least one of a token's experts. Every holder has
    the same number of experts, with consecutive ids."""
    hit_SH = np.zeros((SAMPLES, holders), dtype=bool)
    np.put_along_axis(hit_SH, _chosen(experts, *rule) // (experts // holders), True, 1)
    return float(hit_SH.sum(1).mean())


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
