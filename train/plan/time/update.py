"""Computes the seconds between the last micro-batch and the next step: gradient reduction, weight update and gather.

DeepSpeed does this (parallel/zero/whole_weights.py):

1. An all-reduce sums the fp32 gradients over all ranks with the same weights.
2. Each rank updates its shard of the weights.
3. The ranks gather the weights in their storage format.

Special cases:

- A chunk ends before another chunk of its rank: its gradients are reduced during passes (step_time.py).
- ZeRO stage 3: gathers and reductions run in every micro-batch, so only the update counts here.
- Orthogonalised matrices: the ranks send them to owners and back while they compute (parallel/owners.py). The longer
  one of both times counts, sending or computing.
- Optimizer on the host: gradients are copied to the host, and rounded weights back. The host's memory bandwidth limits
  the update.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from conf.optimizers import OptimizerFacts
from conf.schema import Config, Model
from parallel.layout import Layout
from parallel.owners import KEEPS
from train.model.count import count_parameters
from train.optim.matrices import logical_matrices, newton_schulz_flops
from train.plan.job import device_kind
from train.plan.memory.part import FrozenSection
from train.plan.memory.rank_memory import chunk_parts
from train.plan.memory.rank_weights import held_bytes, part_weights, rank_weights
from train.plan.time.rates import Rates
from train.plan.work_recorder import Work

DEVICE_PASSES = 20
"""Bytes per gradient element that a reduction reads and writes on the device."""
NORM_BYTES, CLIP_BYTES = 4, 8
"""Bytes read or written per element of a shard: for the gradient norm, and for clipping (ZeRO stage 3)."""


@dataclass(frozen=True)
class UpdateTime:
    """Seconds of reduction, optimizer and gather."""

    reduce: float
    """Seconds of reduction and its copies, without the seconds in `hidden`."""
    optimizer: float
    gather: float
    hidden: float = 0.0
    """Seconds saved because gradients are reduced while passes still run; not included in `seconds`."""

    @property
    def seconds(self) -> float:
        return self.reduce + self.optimizer + self.gather


@dataclass(frozen=True)
class WeightCounts:
    """Numbers of dense weights and of expert weights of one rank."""

    dense: float
    experts: float
    orthogonal: tuple["Orthogonal", ...] = ()
    """Orthogonalised matrices of dense weights, and of experts; empty without any."""
    frozen_dense: int = 0
    """With an adapter: bytes of frozen dense weights, which `dense` excludes."""
    frozen_experts: int = 0
    """With an adapter: bytes of frozen expert weights, which `experts` excludes."""


@dataclass(frozen=True)
class Orthogonal:
    """Matrices that the optimizer orthogonalises, each on the rank that owns it."""

    elements: float
    """Number of elements of all matrices."""
    flops: float
    """Number of operations that orthogonalise all matrices."""
    largest: float
    """Number of operations that orthogonalise the most expensive matrix."""
    dearest: int
    """Number of matrices that need `largest` operations each."""

    def busiest(self, ranks: int) -> float:
        """Returns an upper bound on the busiest rank's FLOPs. ranks: number of possible owners."""
        return max(KEEPS * max(self.flops / ranks, self.largest), math.ceil(self.dearest / ranks) * self.largest)

    def moved(self, ranks: int) -> float:
        """Returns the fp32 bytes that a rank sends to owners and back."""
        return 2 * 4 * self.elements * (ranks - 1) / ranks**2


def count_weights(config: Config, layers: list[range], stage_ids: list[int], last: int) -> WeightCounts:
    """Returns the numbers of weights of one rank.

    layers: layers of every stage
    stage_ids: stages of the rank
    last: index of the last stage
    """
    model, parallel = config.model, config.parallel
    if config.adapter.on:
        chunks = [parts for rank in chunk_parts(config, layers) for stage, parts in rank.items() if stage in stage_ids]
        found = rank_weights(config, chunks)
        kinds = [[weight for weight in found if weight.is_expert == kind] for kind in (False, True)]
        dense, experts = (sum(weight.elements for weight in kind if weight.is_trained) for kind in kinds)
        frozen = [held_bytes(config, [weight for weight in kind if not weight.is_trained]) for kind in kinds]
        return WeightCounts(dense, experts, frozen_dense=frozen[0], frozen_experts=frozen[1])
    counts = count_parameters(model)
    per_layer = counts.expert * model.experts
    dense = experts = 0.0
    for stage in stage_ids:
        for index in layers[stage]:
            moe = index >= model.dense_layers
            dense += counts.moe_block - per_layer if moe else counts.dense_block
            experts += per_layer if moe else 0
    modules = model.mtp_depth if last in stage_ids else 0
    if last in stage_ids:
        dense += counts.embedding + model.hidden + counts.mtp - modules * per_layer
        experts += modules * per_layer
    if 0 in stage_ids or modules:  # if the first and the last stage are on one rank, they share a table
        dense += counts.embedding
    return WeightCounts(dense, experts / parallel.ep, _orthogonal(config, layers, stage_ids, last))


def _orthogonal(config: Config, layers: list[range], stage_ids: list[int], last: int) -> tuple[Orthogonal, ...]:
    """Returns orthogonalised matrices of dense weights, and of one rank's experts."""
    facts, muon = config.optim.facts, config.optim.muon
    if not facts.matrices.is_whole:
        return ()
    model, share = FrozenSection(config.model), config.model.experts // config.parallel.ep
    blocks = ["dense" if i < config.model.dense_layers else "moe" for stage in stage_ids for i in layers[stage]]
    parts = [*blocks, *["end"] * (last in stage_ids)]
    found = [_part_orthogonal(model, facts, part, share, muon.by_head, muon.iteration) for part in parts]
    return tuple(_joined([each[kind] for each in found]) for kind in range(2))


@lru_cache(maxsize=256)
def _part_orthogonal(
    model: FrozenSection[Model], facts: OptimizerFacts, part: str, share: int, by_head: bool, iteration: str
) -> tuple[Orthogonal, Orthogonal]:
    """Returns a part's orthogonalised matrices of dense weights, and of one rank's experts."""
    found: tuple[list[Orthogonal], list[Orthogonal]] = [], []
    for weight in part_weights(model, part, share):
        if facts.choose_rule(weight.name, len(weight.shape)).is_whole:
            matrices = logical_matrices(weight.name, weight.shape, model.section, by_head)
            costs = [newton_schulz_flops(*one.shape, iteration) for one in matrices]
            one = Orthogonal(weight.elements, sum(costs), max(costs), costs.count(max(costs)))
            found[weight.is_expert].append(one)
    return _joined(found[0]), _joined(found[1])


def _joined(parts: Sequence[Orthogonal]) -> Orthogonal:
    largest = max((one.largest for one in parts), default=0.0)
    return Orthogonal(
        sum(one.elements for one in parts),
        sum(one.flops for one in parts),
        largest,
        sum(one.dearest for one in parts if one.largest == largest),
    )


def _orthogonal_time(config: Config, rates: Rates, held: WeightCounts, groups: list[tuple[float, int, int]]) -> float:
    """Returns the seconds to orthogonalise: computing or sending, whichever is longer."""
    seconds = 0.0
    form = "bf16" if device_kind(config) == "cuda" else "fp32"
    for one, (_, group, per_node) in zip(held.orthogonal, groups, strict=False):
        matmul_time = rates.of(Work(f"fprop_{form}", one.busiest(group)))
        moved = one.moved(group)
        seconds += max(matmul_time, _collective("all_to_all", rates, moved, group, per_node) if group > 1 else 0.0)
    return seconds


def ring_bandwidth_share(group: int, per_node: int) -> tuple[str, float]:
    """Returns the kind of link that limits a ring, and how many such links a node uses.

    group: number of ranks in the ring
    per_node: number of ranks of the ring on each node
    """
    return ("inside", 1.0) if group <= per_node else ("across", float(per_node))


def sharers(layout: Layout, held: WeightCounts) -> list[tuple[float, int, int]]:
    """Returns two tuples, the first for dense weights, the second for experts.

    Each has the number of weights of a rank, the number of ranks with the same weights, and how many of these ranks are
    on one node.
    """
    inside_node = min(layout.stage_ranks, layout.ranks_per_node)
    return [
        (held.dense, layout.stage_ranks, inside_node),
        (held.experts, layout.edp, max(1, inside_node // layout.ep)),
    ]


def update_time(config: Config, layout: Layout, rates: Rates, held: WeightCounts) -> UpdateTime:
    """Returns the seconds of a rank's update."""
    element = config.precision.weight_bytes
    groups = sharers(layout, held)
    reduce = gather = shard = copied = 0.0
    for weights, group, per_node in groups:
        shard += weights / group
        if config.parallel.zero < 3 and (group > 1 or config.precision.name == "fp32"):
            copied += weights
        if group == 1 or not weights:
            continue
        moved = weights * (group - 1) / group
        if config.parallel.zero < 3:
            reduce += _collective("reduce", rates, 2 * moved * 4, group, per_node)
            gather += _collective("gather", rates, moved * element, group, per_node)
    shard_bytes = NORM_BYTES + (CLIP_BYTES if config.parallel.zero == 3 else 0)
    passes = [Work("memory", bytes=copied * DEVICE_PASSES), Work("memory", bytes=shard * shard_bytes)]
    update = Work(
        "optimizer", bytes=shard * config.optim.facts.count_update_bytes(config.precision.moment_bytes, element)
    )
    orthogonal = _orthogonal_time(config, rates, held, groups)
    factor = rates.factor("update")
    if config.parallel.offload_optimizer:
        out, back = (to_host(config, rates, shard * size) for size in (4, element))
        there = "optimizer" if config.hardware.device == "cpu" else "host_memory"
        on_host = Work(there, bytes=update.bytes + shard * NORM_BYTES)
        return UpdateTime(
            reduce + factor * rates.of(passes[0]) + out, factor * rates.of(on_host) + orthogonal + back, gather
        )
    own = factor * rates.of(passes[0]), factor * (rates.of(passes[1]) + rates.of(update))
    return UpdateTime(reduce + own[0], own[1] + orthogonal, gather)


def to_host(config: Config, rates: Rates, moved: float) -> float:
    """Returns the seconds to copy `moved` bytes between device and host."""
    if config.hardware.device == "cpu":
        return rates.of(Work("copy", bytes=2 * moved))
    return rates.of(Work("host", bytes=moved))


def _collective(name: str, rates: Rates, moved: float, group: int, per_node: int) -> float:
    """Returns the seconds of a collective over rings. Between nodes, it takes at least as long as inside one node.

    moved: bytes that each rank sends
    """
    where, links = ring_bandwidth_share(group, per_node)
    seconds = rates.of(Work(f"{name}_{where}", bytes=moved / links))
    return seconds if where == "inside" else max(seconds, rates.of(Work(f"{name}_inside", bytes=moved)))


def stage3_passes(config: Config) -> tuple[int, int]:
    """Returns how often a micro-batch at ZeRO stage 3 reduces all gradients, and gathers all weights.

    In a warm-up of indexers, backward gathers no weights. The indexers' gradients are too few to count.
    """
    return (0, 1) if config.optim.index_warmup else (1, 2)


def stage3_seconds(config: Config, layout: Layout, rates: Rates, held: WeightCounts) -> tuple[float, float]:
    """Returns a forward's and a backward's communication seconds at ZeRO stage 3."""
    element, (reductions, gathers) = config.precision.weight_bytes, stage3_passes(config)
    gather = reduce = 0.0
    frozen_weights = held.frozen_dense, held.frozen_experts
    for (weights, group, per_node), frozen in zip(sharers(layout, held), frozen_weights, strict=True):
        if group > 1 and weights + frozen:
            away = (group - 1) / group
            gather += _collective("gather", rates, (weights * element + frozen) * away, group, per_node)
            reduce += _collective("reduce", rates, weights * 4 * away, group, per_node)
    return gather, (gathers - 1) * gather + reductions * reduce
