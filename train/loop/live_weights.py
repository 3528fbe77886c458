"""Reads and replaces the weights of a live model under Hugging Face's names, for example for samplers.

To read the weights, each rank writes its elements into a bucket of zeros, and an all-reduce adds the buckets. Each
element is nonzero on one rank only, so the sum is exact. The values are the fp32 master weights, rounded to the
requested dtype.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import UserError
from conf.schema import BaseFormat, Config
from parallel.shard import Shard
from train.hf.adapter_folder import AdaptedTensor, adapted_tensors
from train.hf.tensor_names import PlacedTensor, tensors
from train.kernels.precision import activation_dtype
from train.loop.state import RunState

BUCKET_ELEMENTS = 1 << 26
"""Maximum number of elements in a bucket: 256 MB in fp32."""
STACKED_NAMES = {"w13": "gate_up_proj", "w2": "down_proj"}
"""transformers' names for stacked experts, by Sluice's names."""


class _Wanted(NamedTuple):
    """A requested Hugging Face tensor, with LoRA A and B to add."""

    placed: PlacedTensor
    lora: AdaptedTensor | None = None

    @property
    def parts(self) -> list[PlacedTensor]:
        return [self.placed] if self.lora is None else [self.placed, self.lora.a, self.lora.b]


@torch.no_grad()
def live_weights(
    config: Config,
    state: RunState,
    device: torch.device,
    *,
    merged: bool = True,
    stacked: bool = False,
    dtype: torch.dtype | None = None,
    bucket: int = BUCKET_ELEMENTS,
) -> Iterator[tuple[str, Tensor]]:
    """See `Engine.weights`. Collective. bucket: maximum elements of a bucket."""
    dtype = dtype or activation_dtype(config.precision)
    held = {name: shard for name, shard in state.shards().items() if name.startswith(("master.", "bias."))}
    if config.adapter.on and (stacked or (merged and config.adapter.base is BaseFormat.fp8)):
        given, rule = (
            ("stacked", "has A and B for every expert")
            if stacked
            else ("fp8", "is added to plain weights, and its base is FP8")
        )
        raise UserError(
            "adapter", given, f"an adapter {rule}", "use weights(merged=False), or export with export.merge=true"
        )
    if config.adapter.on and merged:
        held |= state.owned_base()
    for wanted in _buckets(list(_wanted(config, state, merged, stacked)), bucket):
        parts = [part for one in wanted for part in one.parts]
        flat = torch.zeros(sum(part.count for part in parts), device=device)
        pieces = flat.split([part.count for part in parts])
        for piece, part in zip(pieces, parts, strict=True):
            _fill(piece, part, held.get(part.ours))
        dist.all_reduce(flat)
        found = iter(piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True))
        for one in wanted:
            value = next(found)
            if one.lora is not None:
                a, b = next(found), next(found)
                value = value.add_(b @ a, alpha=config.adapter.scale)
            # balance biases stay in fp32: bf16 would change the chosen experts
            yield one.placed.theirs, value if one.placed.ours.startswith("bias.") else value.to(dtype)


@torch.no_grad()
def fill_live(config: Config, state: RunState, weights: Iterable[tuple[str, Tensor]]) -> None:
    """See `Engine.fill`. Each rank copies only elements of its shards."""
    if config.adapter.on:
        raise UserError("adapter", "lora", "does not accept whole weights", "use an engine without an adapter")
    places, held = {placed.theirs: placed for placed in tensors(config.model, state.family)}, state.wanted_of_start()
    for name, tensor in weights:
        placed = places.get(name)
        if placed is None or tensor.shape != placed.shape:
            wanted = "is not a tensor of this model" if placed is None else f"must be {placed.shape}"
            raise UserError(
                f"weights: {name}",
                tuple(tensor.shape),
                wanted,
                "use the names and shapes of `weights` of the same model",
            )
        if (shard := held.get(placed.ours)) is not None:
            first, end = _overlap(placed, shard)
            if first < end:
                values = tensor.flatten()[first - placed.start : end - placed.start]
                shard.local[first - shard.offset : end - shard.offset].copy_(values)
    state.zero.finish_load(state.zero.client.updates)


def _wanted(config: Config, state: RunState, merged: bool, stacked: bool) -> Iterator[_Wanted]:
    """Returns the requested tensors, in folder order."""
    model, adapter = config.model, config.adapter
    adapted = list(adapted_tensors(model, state.family, adapter.targets, adapter.rank)) if adapter.on else []
    if adapted and not merged:
        yield from (_Wanted(part) for one in adapted for part in (one.a, one.b))
        return
    lora = {(one.base.ours, one.base.start): one for one in adapted}
    for placed in tensors(model, state.family):
        _, is_expert, matrix = placed.ours.partition(".moe.experts.")
        if not (stacked and is_expert):
            yield _Wanted(placed, lora.get((placed.ours, placed.start)))
        elif placed.start == 0:
            stem = placed.theirs.partition(".experts.")[0]
            yield _Wanted(replace(placed, theirs=f"{stem}.experts.{STACKED_NAMES[matrix]}", shape=placed.whole))


def _buckets(wanted: list[_Wanted], bucket: int) -> Iterator[list[_Wanted]]:
    found: list[_Wanted] = []
    room = bucket
    for one in wanted:
        size = sum(part.count for part in one.parts)
        if found and size > room:
            yield found
            found, room = [], bucket
        found.append(one)
        room -= size
    yield found


def _overlap(part: PlacedTensor, shard: Shard) -> tuple[int, int]:
    """Returns the intersection of `part` and `shard`, as an interval of Sluice's tensor."""
    return max(part.start, shard.offset), min(part.start + part.count, shard.offset + shard.local.numel())


def _fill(target: Tensor, part: PlacedTensor, shard: Shard | None) -> None:
    """Copy this rank's elements into `target`."""
    first, end = (0, 0) if shard is None else _overlap(part, shard)
    if shard is not None and first < end:
        target[first - part.start : end - part.start] = shard.local[first - shard.offset : end - shard.offset]
