"""Intervals of flattened tensors: whether they cover a range, and the table of all ranks' intervals."""

import json
import math
import zlib
from typing import Any

from cluster.run_files import data_name, index_name
from train.checkpoint.manifest import (
    CHECKPOINT_VERSION,
    FORMAT,
)


class NotCovered(ValueError):
    """The intervals of all ranks together do not make up a tensor."""


def first_hole(intervals: list[tuple[int, int]], start: int, stop: int) -> int | None:
    """The first element of [start, stop) in no (start, count) interval; they come by rising start. None if covered."""
    reached = start
    for begin, count in intervals:
        if begin > reached:
            break
        reached = max(reached, begin + count)
    return reached if reached < stop else None


def merge_indexes(indexes: list[bytes], meta: dict[str, Any]) -> dict[str, Any]:
    """Body of the manifest for the index files of ranks 0, 1, ...; NotCovered if a tensor has a hole.

    Intervals may overlap: replicas that several ranks hold are read from any of them.
    """
    ranks = [json.loads(text) for text in indexes]
    tensors: dict[str, tuple[str, list[int], list[tuple[int, int, int]]]] = {}
    files: dict[str, list[int]] = {}
    for rank, (text, index) in enumerate(zip(indexes, ranks, strict=True)):
        assert [index[key] for key in ("rank", "step", "attempt")] == [rank, ranks[0]["step"], ranks[0]["attempt"]]
        files[index_name(rank)] = [len(text), zlib.crc32(text)]
        files[data_name(rank)] = [index["header_bytes"] + index["data_bytes"]]
        for name, (dtype, shape, start, count, _) in index["tensors"].items():
            known = tensors.setdefault(name, (dtype, shape, []))
            if known[:2] != (dtype, shape):
                raise NotCovered(f"{name} is {dtype} {shape} on rank {rank}, but {known[0]} {known[1]} on another")
            known[2].append((rank, start, count))
    for name, (_, shape, intervals) in tensors.items():
        intervals.sort(key=lambda interval: interval[1])
        hole = first_hole([interval[1:] for interval in intervals], 0, math.prod(shape))
        if hole is not None:
            raise NotCovered(f"no rank saved element {hole} of {name}, shape {shape}")
    identity = {"step": ranks[0]["step"], "attempt": ranks[0]["attempt"], "world_size": len(ranks)}
    return {
        "format": FORMAT,
        "version": CHECKPOINT_VERSION,
        **identity,
        "meta": meta,
        "files": files,
        "tensors": tensors,
    }
