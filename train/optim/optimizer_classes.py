"""Maps each optimizer's name to its class; conf/optimizers.py has their states."""

from collections.abc import Collection
from typing import Protocol

from conf.optimizers import ADAMW, MUON
from conf.schema import Config
from parallel.shard import ShardedOptimizer
from train.optim.adamw import AdamW, WeightShapes
from train.optim.muon import Muon


class OptimizerClass(Protocol):
    """The functions of an optimizer class that need no instance."""

    def make(self, groups: list[dict], config: Config, parts: Collection[str]) -> ShardedOptimizer:
        """Creates the optimizer for these groups, with the run's settings. parts: see `Kernels.parts`."""

    def count_scratch_bytes(self, kind: str, config: Config, group: WeightShapes, elements: int, compiled: bool) -> int:
        """Returns the scratch memory, in bytes, for an update of `elements` elements. kind: device type."""


OPTIMIZER_CLASSES: dict[str, OptimizerClass] = {ADAMW: AdamW, MUON: Muon}
