"""Computes norms of every layer's weights, and norms of the change that a step's update made to them.

A layer's norm is the root of the sum of squares of its fp32 master weights. Each rank sums the squares of the intervals
that it would write to a checkpoint, so every weight counts once in any layout. An all-reduce adds these sums.

For the norm of the update, each rank copies its master weights to host memory before the update. A run computes the
norms every log.norms_every steps.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema import Config, Model
from conf.thresholds import THRESHOLDS
from parallel.zero.engine import Zero
from train.loop.live_run import LiveRun
from train.metrics.names import Record


def layer_names(model: Model) -> list[str]:
    """Returns the model's parts whose weights get a separate norm, as prefixes of parameter names."""
    blocks = [f"layers.{i}" for i in range(model.layers)]
    return ["embedding", *blocks, "norm", "head", *(f"mtp.{i}" for i in range(model.mtp_depth))]


class LayerNorms:
    """Computes norms of each layer's weights, and of their change in a step, every log.norms_every steps."""

    def __init__(self, config: Config, zero: Zero, device: torch.device):
        self._every = config.log.norms_every
        self._zero, self._device, self._layers = zero, device, layer_names(config.model)
        self._before: dict[str, Tensor] = {}

    def on_phase(self, run: LiveRun, step: int, phase: str) -> None:
        if phase == "update":
            self.keep(step)

    def on_step(self, run: LiveRun, step: int, record: Record) -> None:
        record |= self.collect(step)

    def keep(self, step: int) -> None:
        """Store a copy of the master weights if this step is measured. Call this method before every update."""
        if self._measures(step):
            self._before = {name: master.to("cpu", copy=True) for name, master in self._masters()}

    def collect(self, step: int) -> Record:
        """Returns the norms of the weights and of their change, for each layer and for the whole model. Empty for a
        step that is not measured.

        Call this method after the update, on all ranks.
        """
        if not self._measures(step):
            return {}
        squares_2L = torch.zeros(2, len(self._layers), dtype=torch.float64)
        for name, master in self._masters():
            before, row = self._before.pop(name), self._layers.index(_layer_of(name))
            size = THRESHOLDS.compared_elements
            for now, old in zip(master.split(size), before.split(size), strict=True):
                pair = [now, now - old.to(now.device)]
                squares_2L[:, row] += self._zero.client.sums_of_squares(pair).cpu()
        squares_2L = squares_2L.to(self._device)
        dist.all_reduce(squares_2L)
        weight_L, update_L = squares_2L.sqrt().tolist()
        whole = squares_2L.sum(1).sqrt().tolist()
        return {
            "weight_norm": whole[0],
            "update_norm": whole[1],
            "layer_weight_norm": dict(zip(self._layers, weight_L, strict=True)),
            "layer_update_norm": dict(zip(self._layers, update_L, strict=True)),
        }

    def _measures(self, step: int) -> bool:
        return self._every > 0 and step % self._every == 0

    def _masters(self) -> Iterator[tuple[str, Tensor]]:
        for name, shard in self._zero.shards().items():
            if name.startswith("master.") and shard.local.numel():
                yield name.removeprefix("master."), shard.local


def _layer_of(name: str) -> str:
    """Returns the part of the model that a parameter belongs to."""
    first, second, *_ = name.split(".")
    return f"{first}.{second}" if first in ("layers", "mtp") else first
