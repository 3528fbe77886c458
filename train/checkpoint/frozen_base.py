"""Reads the frozen base weights of an adapter and rounds them to block FP8."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from conf.adapters import is_held_in_blocks
from conf.thresholds import THRESHOLDS
from parallel.shard import Shard
from train.checkpoint.weights_mark import FillShards, WeightsMark
from train.hf.blocks import dequantize, requantize
from train.hf.config import SCALE_BLOCK
from train.kernels.fp8.frozen_blocks import FrozenBlocks


def fill_blocks(
    name: str, blocks: FrozenBlocks, ep: int, held: Tensor, first: int, fill: FillShards, mark: WeightsMark
) -> None:
    """Fill this rank's bytes of one weight in block FP8.

    - ep: number of ranks that share the experts
    - held: buffer for the weight's bytes from index `first` on; may end with padding
    - fill: function that reads fp32 values
    - mark: adds the values to the fingerprint of the base weights
    """
    size, (rows, columns) = blocks.matrix_bytes, blocks.shape[-2:]
    local = range(1) if blocks.experts is None else blocks.experts
    shape = blocks.shape if blocks.experts is None else (len(local) * ep, rows, columns)
    stop = min(first + len(held), len(local) * size)
    numbers = range(first // size, -(-stop // size))
    together = max(1, THRESHOLDS.base_elements // (rows * columns))
    for number in numbers[::together]:
        several = range(number, min(number + together, numbers.stop))
        values = torch.empty(len(several) * rows * columns)
        fill({name: Shard(values, (local.start + number) * rows * columns, shape)})
        for one, matrix in zip(several, values.view(-1, rows, columns), strict=True):
            low, high = max(first, one * size), min(stop, (one + 1) * size)
            q, scale = requantize(matrix)
            held[low - first : high - first].copy_(blocks.pack(q, scale)[low - one * size : high - one * size])
            mark.add(name, dequantize(q, scale), (local.start + one) * rows * columns)


def fill_rounded(fill: FillShards, wanted: dict[str, Shard]) -> None:
    """Fill fp32 shards with base weights, rounded as in training."""
    plain = {name: shard for name, shard in wanted.items() if not is_held_in_blocks(name)}
    fill(plain)
    for name in wanted.keys() - plain.keys():
        _fill_rounded(fill, name, wanted[name])


def _fill_rounded(fill: FillShards, name: str, shard: Shard) -> None:
    """Fill a shard of one weight. Reads whole blocks, because the values of a block share one scale."""
    rows, columns = shard.shape[-2:]
    stop = shard.offset + shard.local.numel()
    for start, count in _block_rows(shard.offset, stop, rows, columns):
        values = torch.empty(count * columns)
        fill({name: Shard(values, start, shard.shape)})
        rounded = dequantize(*requantize(values.view(-1, columns))).flatten()
        low, high = max(shard.offset, start), min(stop, start + len(rounded))
        shard.local[low - shard.offset : high - shard.offset].copy_(rounded[low - start : high - start])


def _block_rows(first: int, stop: int, rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yields, for each matrix, the rows that contain elements of the interval [first, stop).

    Rows are given as (first element, number of rows), and extended to whole blocks.
    """
    size = rows * columns
    for matrix in range(first // size, -(-stop // size)):
        low, high = max(first - matrix * size, 0), min(stop - matrix * size, size)
        row = low // columns // SCALE_BLOCK * SCALE_BLOCK
        end = min(rows, math.ceil(high / columns / SCALE_BLOCK) * SCALE_BLOCK)
        yield matrix * size + row * columns, end - row
