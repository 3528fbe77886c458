"""Eyes on the forward and backward of one rank, at the boundaries of its modules."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from train.model.deepseek import DeepSeekV3


@dataclass(frozen=True, order=True)
class Sighting:
    """A boundary of a module at which a value was not finite; sorted by the order of the forward pass."""

    layer: int
    boundary: int
    """Inside the layer."""
    name: str
    """Name of the module, with what was not finite of it."""
    catching: bool = False
    """A gradient that is a sum over tokens, with experts on several ranks also over those of other ranks."""


class PassWatch:
    """Looks at inputs, outputs and gradients of all modules of these chunks, while it is entered."""

    def __init__(self, chunks: Sequence[DeepSeekV3]):
        self._chunks = chunks
        self.handles: list[Any] = []
        """What ends the watch, by `remove()`."""

    def __enter__(self) -> Self:
        for chunk in self._chunks:
            for name, module, layer in layers_in_order(chunk):
                self._visit(name, module, layer, 0)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def see_value(self, at: Sighting, value: Tensor) -> None:
        """Look at a value of a forward pass."""

    def see_gradient(self, at: Sighting, gradient: Tensor) -> None:
        """Look at the gradient of one, which is all there is of it."""

    def watch(self, name: str, module: nn.Module, start: Sighting, end: Sighting) -> None:
        """See what goes into a module and what comes out."""
        self.handles += [
            module.register_forward_pre_hook(lambda _, inputs: self.see(inputs, start)),
            module.register_forward_hook(lambda _, __, output: self.see(output, end)),
        ]

    def see(self, values: Any, at: Sighting) -> None:
        """Look at the tensors among values, and at their gradients as soon as they are there."""
        for value in tensors_in(values):
            self.see_value(at, value)
            if value.requires_grad and torch.is_grad_enabled():
                value.register_hook(partial(self.see_gradient, at))

    def _visit(self, name: str, module: nn.Module, layer: int, boundary: int) -> int:
        """Watch a module and what is in it; returns the number of its last boundary."""
        start = Sighting(layer, boundary, f"the input of {name}")
        for child_name, child in module.named_children():
            boundary = self._visit(f"{name}.{child_name}", child, layer, boundary + 1)
        end = Sighting(layer, boundary + 1, f"the output of {name}")
        self.watch(name, module, start, end)
        return end.boundary


def layers_in_order(chunk: DeepSeekV3) -> Iterator[tuple[str, nn.Module, int]]:
    """Name, module and place in the forward pass of the embedding, every block, the norm, MTP modules and the head."""
    blocks, depths = chunk.config.layers, chunk.config.mtp_depth
    for name, module in chunk.named_children():
        if name == "layers":
            yield from ((f"layers.{index}", block, int(index)) for index, block in module.named_children())
        elif name == "mtp":
            yield from ((f"mtp.{depth}", each, blocks + 1 + int(depth)) for depth, each in module.named_children())
        else:
            yield name, module, {"embedding": -1, "norm": blocks, "head": blocks + 1 + depths}[name]


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Plain tensors of floating point among values; other kinds (quantised rows) have their values elsewhere."""
    if isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)
    elif type(values) is Tensor and values.is_floating_point():
        yield values


PASSES = ("forward", "backward")


class PlainSightings:
    """A record of one rank, with a sighting in each of the passes, for the other ranks."""

    def plain(self) -> dict[str, Any]:
        """The record in types of JSON."""
        seen = {name: None if (at := getattr(self, name)) is None else list(vars(at).values()) for name in PASSES}
        return vars(self) | seen

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        return cls(**plain | {name: None if plain[name] is None else Sighting(*plain[name]) for name in PASSES})
