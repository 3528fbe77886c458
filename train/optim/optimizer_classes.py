"""Maps the name of each optimizer to its class. conf/optimizers.py describes the state of each optimizer."""

from collections.abc import Collection
from typing import Protocol

from conf.optimizers import ADAMW, MUON
from conf.schema import Config, Precision
from parallel.shard import ShardedOptimizer
from train.optim.adamw import AdamW
from train.optim.muon import Muon


class OptimizerClass(Protocol):
    """The functions of an optimizer class that other code calls before it creates an instance."""

    def make(self, groups: list[dict], config: Config, parts: Collection[str]) -> ShardedOptimizer:
        """Creates the optimizer for these parameter groups, with the run's settings.

        parts: the parts of a step that use compiled code, see `Kernels.parts`.
        """

    def count_scratch_bytes(self, kind: str, precision: Precision, elements: int, compiled: bool) -> int:
        """Returns the bytes of scratch memory for an update of `elements` elements. kind: the device type."""


OPTIMIZER_CLASSES: dict[str, OptimizerClass] = {ADAMW: AdamW, MUON: Muon}
