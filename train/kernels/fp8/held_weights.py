"""Weights as operands of FP8 products, made once a step and held through its micro-batches.

A product takes a weight in two casts: as it is for Fprop, transposed for Dgrad. Weights change between steps alone, so every
micro-batch would make the same ones again. The first step makes each where it is asked for; later ones make all of them before their
passes, which then find the same memory taken from beginning to end.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from train.kernels.fp8.cast_rules import OperandRule
from train.kernels.fp8.engines import Fp8Engine


class HeldWeights:
    """Operands of weights. Between `hold` and `drop` no weight may change.

    making: the context in which operands that are held are made, for whoever counts them apart.
    """

    def __init__(self, engine: Fp8Engine, making: Callable[[], AbstractContextManager] = nullcontext):
        self.engine, self._making, self._holds = engine, making, False
        self._weights: dict[int, nn.Parameter] = {}
        self._asked: dict[tuple[int, bool], OperandRule] = {}
        self._made: dict[tuple[int, bool], Any] = {}

    def name(self, weight: Tensor) -> int | None:
        """What stands for a weight in a backward, which autograd may give another tensor of the same memory. None for what is not held, as is no
        weight that was just made of other bytes.
        """
        if not (self._holds and isinstance(weight, nn.Parameter)):
            return None
        self._weights[id(weight)] = weight
        return id(weight)

    def operand(self, weight: Tensor, name: int | None, rule: OperandRule, transposed: bool = False) -> Any:
        """See `Fp8Engine.operand`."""
        if name is None or not self._holds:
            return self.engine.operand(weight, rule, transposed)
        key = name, transposed
        if key not in self._made:
            with self._making():
                self._made[key] = self.engine.operand(weight, rule, transposed)
            self._asked[key] = rule
        return self._made[key]

    @torch.no_grad()
    def hold(self) -> None:
        """Make what was asked for before, and hold it with all that is asked for from now on."""
        self.drop()
        self._holds = True
        for (name, transposed), rule in self._asked.items():
            self.operand(self._weights[name], name, rule, transposed)

    def drop(self) -> None:
        """Let go of all operands, before a weight changes."""
        self._holds = False
        self._made.clear()

    def count_bytes(self) -> int:
        """Bytes of what is held, without what are the weights themselves."""
        weights = {weight.untyped_storage()._cdata for weight in self._weights.values()}
        parts = [tensor for made in self._made.values() for tensor in _tensors(made)]
        storages = {one._cdata: one.nbytes() for one in (tensor.untyped_storage() for tensor in parts)}
        return sum(size for key, size in storages.items() if key not in weights)


def _tensors(made: Any) -> list[Tensor]:
    """An operand is a tensor, or has its tensors as fields."""
    return [made] if isinstance(made, Tensor) else [one for one in vars(made).values() if isinstance(one, Tensor)]
