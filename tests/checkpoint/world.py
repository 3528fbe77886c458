"""Objects in one process that act as ranks, and random ways to distribute tensors over them."""

import math
import random
from pathlib import Path

import torch

from parallel.shard import Shard
from train.checkpoint.checkpointer import Checkpointer, SaveResult
from train.checkpoint.staging import DTYPES


def random_tensors(rng: random.Random, count: int, largest: int = 60) -> dict[str, torch.Tensor]:
    """Tensors of random bytes, type and shape, scalars and empty ones among them."""
    tensors = {}
    for i in range(count):
        shape = [rng.choice((0, 1, 2, 5, rng.randint(1, largest))) for _ in range(rng.randint(0, 2))]
        dtype = rng.choice(list(DTYPES))
        raw = torch.tensor([rng.randrange(2 if dtype == torch.bool else 256) for _ in range(math.prod(shape) * 8)])
        tensors[f"kind{i % 3}.{i}"] = raw.to(torch.uint8)[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
    return tensors


def spread(rng: random.Random, tensors: dict[str, torch.Tensor], ranks: int) -> list[dict[str, Shard]]:
    """Each tensor cut at random points and dealt to random ranks: disjoint, together complete."""
    world: list[dict[str, Shard]] = [{} for _ in range(ranks)]
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        holders = rng.sample(range(ranks), rng.randint(1, ranks))
        cuts = sorted(rng.randint(0, flat.numel()) for _ in holders[1:])
        for rank, start, stop in zip(holders, [0, *cuts], [*cuts, flat.numel()], strict=True):
            world[rank][name] = Shard(flat[start:stop].clone(), start, tuple(tensor.shape))
    return world


def blank(shards: dict[str, Shard]) -> dict[str, Shard]:
    """Shards of the same intervals with other memory, to load into."""
    return {name: Shard(torch.zeros_like(s.local), s.offset, s.shape) for name, s in shards.items()}


def same_bits(a: dict[str, Shard], b: dict[str, Shard]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(bits(a[name].local), bits(b[name].local)) for name in a)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


def checkpointers(root: Path, ranks: int, **options) -> list[Checkpointer]:
    options = {"timeout": 600.0, "retry_wait": 0.01, **options}  # a busy disk may take a minute
    return [Checkpointer(root, rank=rank, world_size=ranks, **options) for rank in range(ranks)]


def save(world: list[Checkpointer], step: int, shards: list[dict[str, Shard]], **meta) -> list[SaveResult]:
    """One save over all ranks, awaited; the result of every rank."""
    for checkpointer, own in zip(world, shards, strict=True):
        checkpointer.save(step, own, meta)
    return [checkpointer.finish()[-1] for checkpointer in world]
