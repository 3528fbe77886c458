"""The table of optimizers: what updates the weights of each name. What each keeps stands in conf/optimizers.py."""

from collections.abc import Collection
from typing import Protocol

from conf.optimizers import ADAMW, MUON
from conf.schema import Config, Precision
from parallel.shard import ShardedOptimizer
from train.optim.adamw import AdamW
from train.optim.muon import Muon


class OptimizerClass(Protocol):
    """What is asked of an optimizer before there is one."""

    def make(self, groups: list[dict], config: Config, parts: Collection[str]) -> ShardedOptimizer:
        """The optimizer that a run asks for, over these parameter groups. parts: of a step that run as compiled code, see `Kernels.parts`."""

    def count_scratch_bytes(self, kind: str, precision: Precision, elements: int, compiled: bool) -> int:
        """What an update of so many elements takes beside its operands. kind: of the device."""


OPTIMIZER_CLASSES: dict[str, OptimizerClass] = {ADAMW: AdamW, MUON: Muon}
