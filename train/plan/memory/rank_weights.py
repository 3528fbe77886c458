"""Lists the weights of a rank in DeepSpeed's order, and their shards under ZeRO (parallel/zero).

Sizes are in bytes, unless a name says elements.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from conf.optimizers import UpdateRule
from conf.schema import Adapter, BaseFormat, Config, Model
from train.kernels.fp8.frozen_blocks import hold_in_blocks
from train.kernels.plain.high import HighPrecision
from train.kernels.plain.plain_kernels import PlainKernels
from train.model.adapter import add_adapters
from train.model.deepseek import DeepSeekV3
from train.optim.adamw import WeightShapes
from train.optim.optimizer_classes import OPTIMIZER_CLASSES
from train.plan.memory.chunk import Parts
from train.plan.memory.part import NO_ADAPTER, FrozenSection, Scene, kind_of, sparse_of

FP32_BYTES = 4
"""Bytes of an fp32 element."""


@dataclass(frozen=True)
class Weight:
    name: str
    shape: tuple[int, ...]
    is_trained: bool = True
    """Frozen weights have no master weight, moments or gradient."""
    item_bytes: int | None = None
    """Bytes per element; None for the recipe's weight format."""
    chunk: int | None = None
    """Index of the weight's chunk; None for an embedding that two chunks use."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_expert(self) -> bool:
        return ".experts." in self.name


@lru_cache(maxsize=256)
def part_weights(
    model: FrozenSection[Model], part: str, local_experts: int, adapter: FrozenSection[Adapter] = NO_ADAPTER
) -> tuple[Weight, ...]:
    """Returns a model part's weights (train/plan/memory/part.py). The part `end` does not include the embedding."""
    config = replace(model.section, sparse=sparse_of(part, model.section))
    layers = {"dense": range(1), "moe": range(config.dense_layers, config.dense_layers + 1)}.get(
        kind_of(part), range(0)
    )
    chunk = DeepSeekV3(
        config,
        HighPrecision(torch.float32, PlainKernels()),
        seq_len=1,
        layers=layers,
        has_embedding=part == "embedding",
        has_head=part == "end",
        local_experts=range(local_experts),
        device="meta",
    )
    if adapter.section.base is BaseFormat.fp8:
        hold_in_blocks(chunk)
    if adapter.section.on:
        add_adapters(chunk, adapter.section, PlainKernels(), seed=0)
    return tuple(
        Weight(name, tuple(param.shape), param.requires_grad, 1 if param.dtype == torch.uint8 else None)
        for name, param in chunk.named_parameters()
        if part == "embedding" or not name.startswith("embedding")
    )


def held_bytes(config: Config, weights: Sequence[Weight]) -> int:
    """Returns the bytes of unsharded weights in their stored formats."""
    usual = config.precision.weight_bytes
    return sum(weight.elements * (weight.item_bytes or usual) for weight in weights)


def rank_weights(config: Config, chunks: Sequence[Parts]) -> list[Weight]:
    """Returns the weights of a rank's chunks. An embedding that two chunks use is listed once."""
    model, share = FrozenSection(config.model), config.model.experts // config.parallel.ep
    has_table = any(needs_table(config.model, parts) for parts in chunks)
    names = [(None if config.model.mtp_depth else 0, "embedding")] * has_table
    names += [(chunk, part) for chunk, parts in enumerate(chunks) for part in parts if part != "embedding"]
    adapter = FrozenSection(config.adapter)
    return [weight for chunk, name in names for weight in _chunk_weights(chunk, model, name, share, adapter)]


@lru_cache(maxsize=256)
def _chunk_weights(chunk: int | None, *part: Any) -> list[Weight]:
    return [replace(weight, chunk=chunk) for weight in part_weights(*part)]


def needs_table(model: Model, parts: Parts) -> bool:
    """Whether a chunk needs the embedding table."""
    return "embedding" in parts or ("end" in parts and model.mtp_depth > 0)


@dataclass(frozen=True)
class Shards:
    """One parameter group, which DeepSpeed flattens, pads and cuts into equal shards."""

    weights: list[Weight]
    ranks: int
    rule: UpdateRule

    @property
    def elements(self) -> int:
        return sum(weight.elements for weight in self.weights)

    @property
    def partition(self) -> int:
        """Number of elements of this rank's shard. DeepSpeed rounds this number up to an even number."""
        return math.ceil(self.elements / (2 * self.ranks)) * 2

    @property
    def scattered(self) -> int:
        """Number of elements of this rank's shards at ZeRO stage 3, which shards each weight separately."""
        return sum(math.ceil(weight.elements / self.ranks) for weight in self.weights)


def shards(config: Config, weights: Sequence[Weight]) -> list[Shards]:
    """Returns a rank's parameter groups in DeepSpeed's order, without empty groups."""
    parallel, facts = config.parallel, config.optim.facts
    kinds = {(experts, rule): [] for experts in (False, True) for rule in facts.rules}
    for weight in (weight for weight in weights if weight.is_trained):
        kinds[weight.is_expert, facts.choose_rule(weight.name, len(weight.shape))].append(weight)
    ranks = parallel.stage_ranks, parallel.stage_ranks // parallel.ep
    return [Shards(found, ranks[experts], rule) for (experts, rule), found in kinds.items() if found]


def scratch_bytes(config: Config, group: Shards, elements: int, scene: Scene) -> int:
    """Returns the scratch bytes of a group's update. elements: number of elements of this rank's shard."""
    weights = WeightShapes(group.rule, [(one.name, one.shape) for one in group.weights])
    optimizer = OPTIMIZER_CLASSES[config.optim.facts.name]
    return optimizer.count_scratch_bytes(scene.kind, config, weights, elements, scene.compiled)


def state_bytes(config: Config, groups: Sequence[Shards], owned: Callable[[Shards], int]) -> int:
    """Returns the bytes of this rank's optimizer state.

    owned: function that returns the number of elements of a group for which the rank has the state
    """
    moment = config.precision.moment_bytes
    return sum(group.rule.count_state_bytes(moment) * owned(group) for group in groups)
