"""Computes a fingerprint (mark) of an adapter's base weights while they are read, in any file format and layout.

    mark = sum over all elements of  number(value) * factor(index in its block) * factor(tensor, block)    mod 2^64

- A block is BLOCK consecutive elements of a flattened tensor.
- number(value) is an integer computed from the value in bf16, equal for fp32, bf16 and block FP8.
- All factors are odd, so a change of a single value changes the mark.
- The main model and each MTP module have separate sums, because MTP modules may be left out.
"""

import hashlib
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parallel.shard import Shard

FillShards = Callable[[dict[str, Shard]], Any]
"""A function that fills shards, by their names in a checkpoint."""
BLOCK, BLOCKS_AT_ONCE = 1 << 14, {"cpu": 4, "cuda": 512}
"""BLOCK: number of elements in a block. BLOCKS_AT_ONCE: number of blocks that one call sums, by device type."""
MODULUS = 1 << 64
"""The sums are computed modulo this number, like unsigned 64-bit integers."""
MarkedPart = tuple[str, int, int, int]
"""Sum over an interval: (tensor name, first element, end (exclusive), sum)."""


class WeightsMark:
    """Computes a fingerprint of the weights that are read."""

    def __init__(self) -> None:
        self.parts: list[MarkedPart] = []
        self._taken: dict[str, list[tuple[int, int]]] = {}

    def watching(self, fill: FillShards) -> FillShards:
        """Returns a function that fills shards like `fill`, and adds their values to the fingerprint."""

        def watched(wanted: dict[str, Shard]) -> Any:
            found = fill(wanted)
            for name, shard in wanted.items():
                self.add(name, shard.local, shard.offset)
            return found

        return watched

    def add(self, name: str, values: Tensor, offset: int) -> None:
        """Add an interval of a tensor; ignore elements that were added before."""
        name = f"master.{name.removeprefix('ema.')}" if name.startswith("ema.") else name
        taken, place, stop = self._taken.setdefault(name, []), offset, offset + values.numel()
        for first, last in [*(one for one in sorted(taken) if one[1] > offset), (stop, stop)]:
            end = min(first, stop)
            if place < end:
                part = values.detach().flatten()[place - offset : end - offset]
                self.parts.append((name, place, end, _sum(name, part, place)))
                taken.append((place, end))
            place = max(place, last)
        taken[:] = _joined(taken)

    def text(self, gather: Callable[[list[MarkedPart]], Iterable[Iterable[Any]]] = lambda parts: [parts]) -> str:
        """Returns the fingerprint. gather: function that returns the sums of all ranks."""
        sums: dict[str, int] = {}
        reached: dict[str, int] = {}
        for name, start, stop, value in sorted({tuple(part) for rank in gather(self.parts) for part in rank}):
            assert start >= reached.get(name, 0), f"two ranks have different parts of {name}"
            reached[name] = stop
            plain = name.split(".")[1:]
            section = plain[1] if plain[0] == "mtp" else ""
            sums[section] = (sums.get(section, 0) + value) % MODULUS
        return "-".join(f"{sums[section]:016x}" for section in sorted(sums))


def same_weights(one: str | None, other: str | None) -> bool:
    """Whether two fingerprints agree in all sums that both contain. A missing fingerprint agrees with every other."""
    return not one or not other or all(a == b for a, b in zip(one.split("-"), other.split("-"), strict=False))


def _joined(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for start, stop in sorted(intervals):
        if found and found[-1][1] >= start:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        else:
            found.append((start, stop))
    return found


def _sum(name: str, values: Tensor, offset: int) -> int:
    """Returns the weighted sum of an interval. offset: first element."""
    start, total, done = _start(name), 0, 0
    factors = _odd(0, BLOCK).to(values.device)
    while done < values.numel():
        number, place = divmod(offset + done, BLOCK)
        count = min(values.numel() - done, BLOCK - place)
        if count == BLOCK:
            count *= min(BLOCKS_AT_ONCE[values.device.type], (values.numel() - done) // BLOCK)
        bits = values[done : done + count].bfloat16().view(torch.int16)
        negative = bits >> 15
        numbers = ((bits & 0x7FFF) ^ negative).sub_(negative).long()  # magnitude with sign, and 0 for both zeros
        if count < BLOCK:
            sums = numbers.mul_(factors[place : place + count]).sum().view(1)
        else:
            sums = numbers.view(-1, BLOCK).mul_(factors).sum(1)
        total += int((sums.cpu() * _odd(start + number, len(sums))).sum())
        done += count
    return total % MODULUS


@cache
def _start(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")


@cache
def _block_factors() -> Tensor:
    return _mixed(0, BLOCK)


def _odd(first: int, count: int) -> Tensor:
    """Returns `count` odd 64-bit factors from index `first` on."""
    return _block_factors() if (first, count) == (0, BLOCK) else _mixed(first, count)


def _mixed(first: int, count: int) -> Tensor:
    """Computes odd factors by the finaliser of SplitMix64 (Steele et al., 2014)."""
    mixed = (np.arange(first, first + count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return torch.from_numpy(((mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)).view(np.int64))
