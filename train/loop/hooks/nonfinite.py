"""Finds where non-finite values began: the rank, the layer, and the forward or backward pass.

A NaN in a sum over ranks does not show which rank it came from. So the ranks repeat a skipped step with the same
weights and data, and a `Watch` checks every module. The gradients of the repeated step are discarded.

A sighting is a module boundary at which a value was not finite. Each rank reports its sightings. The origin is

    forward     the first layer with a sighting in the forward pass
    backward    the last layer with a sighting in the backward pass, if the forward pass was finite everywhere

If the repeated step is finite, neither the weights nor the data caused the non-finite value. Then the most likely cause
is a faulty device.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from conf.words import some_of
from train.model.deepseek import DeepSeekV3

SHOWN_TENSORS = 8
"""Maximum number of names in a sentence."""


@dataclass(frozen=True, order=True)
class Sighting:
    """A module boundary (an input, an output or a weight of a module) at which a value was not finite.

    Sightings sort in the order of the forward pass.
    """

    layer: int
    boundary: int
    """Index of this module boundary among all module boundaries of its layer."""
    name: str
    """The tensor that was not finite: the module's input, its output or a weight."""
    catching: bool = False
    """Whether the value is a weight's gradient, which is a sum over tokens. With expert parallelism, another rank's
    tokens may have caused the non-finite value."""


PASSES = ("forward", "backward")


@dataclass(frozen=True)
class RankSightings:
    """What one rank found when it repeated a skipped step."""

    rank: int
    replica: int
    """The data-parallel rank. Ranks with the same data-parallel rank process the same samples."""
    loss: bool | None
    """Whether this rank's loss was finite; None on a rank that computes no loss."""
    gradients: list[str]
    """Parameters of this rank's shard whose gradient, summed over ranks, is not finite; at most SHOWN_TENSORS names."""
    weights: list[str]
    """Names of parameters with non-finite values."""
    forward: Sighting | None
    backward: Sighting | None

    def plain(self) -> dict[str, Any]:
        """Returns the findings as JSON values, which can be sent to other ranks."""
        seen = {name: None if (at := getattr(self, name)) is None else list(vars(at).values()) for name in PASSES}
        return vars(self) | seen

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        return cls(**plain | {name: None if plain[name] is None else Sighting(*plain[name]) for name in PASSES})


class Watch:
    """A context that checks all modules of some chunks for non-finite values."""

    def __init__(self, chunks: Sequence[DeepSeekV3]):
        self._chunks = chunks
        self._handles: list[RemovableHandle] = []
        self.forward: Sighting | None = None
        """The first sighting in the forward pass, in layer order; None if all values were finite."""
        self.backward: Sighting | None = None
        """The sighting that the backward pass reached first, which is the last one in layer order; None if all
        gradients were finite."""

    def __enter__(self) -> Self:
        for chunk in self._chunks:
            for name, module, layer in _layers_in_order(chunk):
                self._visit(name, module, layer, 0)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _visit(self, name: str, module: nn.Module, layer: int, boundary: int) -> int:
        """Install hooks that check the inputs and outputs of a module and of its children.

        boundary: index of the module's input in forward order. Returns the index of the module's output.
        """
        start = Sighting(layer, boundary, f"the input of {name}")
        for child_name, child in module.named_children():
            boundary = self._visit(f"{name}.{child_name}", child, layer, boundary + 1)
        end = Sighting(layer, boundary + 1, f"the output of {name}")
        self._watch(name, module, start, end)
        return end.boundary

    def _watch(self, name: str, module: nn.Module, start: Sighting, end: Sighting) -> None:
        """Install hooks that check a module's inputs and outputs, and the gradients of its weights."""
        self._handles += [
            module.register_forward_pre_hook(lambda _, inputs: self._see(inputs, start)),
            module.register_forward_hook(lambda _, __, output: self._see(output, end)),
        ]
        for part, param in module.named_parameters(recurse=False):
            if param.requires_grad:
                at = Sighting(start.layer, start.boundary, f"the weight {name}.{part}", catching=True)
                self._handles.append(param.register_hook(partial(self._see_weights_gradient, at, param)))

    def _see(self, values: Any, at: Sighting) -> None:
        """Check the tensors among `values`, and later their gradients, when autograd has computed them."""
        for value in _tensors_in(values):
            if (self.forward is None or at < self.forward) and not is_finite(value):
                self.forward = at
            if value.requires_grad and torch.is_grad_enabled():
                value.register_hook(partial(self._see_gradient, at))

    def _see_gradient(self, at: Sighting, gradient: Tensor) -> None:
        if (self.backward is None or at > self.backward) and not is_finite(gradient):
            self.backward = at

    def _see_weights_gradient(self, at: Sighting, param: nn.Parameter, gradient: Tensor | None) -> None:
        """Check a weight's gradient.

        gradient: None if a GEMM has already added the gradient to `param.grad`. Then the method checks `param.grad`.
        """
        gradient = param.grad if gradient is None else gradient
        if gradient is not None:
            self._see_gradient(at, gradient)


def _layers_in_order(chunk: DeepSeekV3) -> Iterator[tuple[str, nn.Module, int]]:
    """Yields name, module and forward position of a chunk's embedding, blocks, norm, MTP modules and head."""
    blocks, depths = chunk.config.layers, chunk.config.mtp_depth
    for name, module in chunk.named_children():
        if name == "layers":
            yield from ((f"layers.{index}", block, int(index)) for index, block in module.named_children())
        elif name == "mtp":
            yield from ((f"mtp.{depth}", each, blocks + 1 + int(depth)) for depth, each in module.named_children())
        else:
            yield name, module, {"embedding": -1, "norm": blocks, "head": blocks + 1 + depths}[name]


def _tensors_in(values: Any) -> Iterator[Tensor]:
    """Yields the plain floating-point tensors among `values`, without other kinds such as quantised rows."""
    if isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors_in(value)
    elif type(values) is Tensor and values.is_floating_point():
        yield values


def is_finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())


def bad_weights(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Returns the names of parameters with a non-finite value; at most SHOWN_TENSORS names."""
    return sorted({name for name, weight in named if not is_finite(weight)})[:SHOWN_TENSORS]


@dataclass(frozen=True)
class Origin:
    """The place where a non-finite value began, as far as the ranks' findings show it."""

    what: str
    """What was not finite: `non-finite loss` or `non-finite gradient`."""
    phase: str | None
    """The pass in which the non-finite value first appeared: `forward` or `backward`; None if the repeated step was
    finite."""
    where: str
    ranks: tuple[int, ...]
    """Ranks on which the non-finite value first appeared; empty if unknown."""
    alone: bool
    """Whether another data-parallel replica with the same weights had only finite values."""
    weights: tuple[str, ...]

    @property
    def text(self) -> str:
        """Describes the origin in one sentence, without a full stop."""
        whom = f" on {shown_ranks(self.ranks)}" if self.ranks else ""
        if self.weights:
            return f"{self.what}: weights are not finite{whom}: {', '.join(self.weights)}"
        if self.phase is None:
            seen = f"{self.where}{whom}" if self.where else f"the loss{whom}" if whom else "it"
            return f"{self.what}: {seen} was not finite, and was finite when the step was repeated"
        place = self.where if self.phase == "forward" else f"the gradient of {self.where}"
        return f"{self.what}: it began in the {self.phase} pass{whom or ' on all ranks that have it'}, at {place}"

    def advice(self, updates: int, samples: str) -> str:
        """Returns what the user should do about a non-finite value with this origin.

        updates: number of updates so far. samples: text that names the samples of the step.
        """
        older = "resume from an older checkpoint with resume=PATH"
        if self.weights:
            if updates:
                return f"The weights are corrupt, because of a file, memory or an update: {older}"
            return "The initial weights are corrupt: check init_from, and the memory of the device"
        if self.phase is None:
            return f"Neither weights nor data are the cause: test the device and its memory{_of(self.ranks)}, and repeat the command"
        if self.alone:
            return f"Other ranks were finite with the same weights, so the learning rate is not the cause: check samples {samples} of the data, and the device{_of(self.ranks)}"
        if not updates:
            return f"There was no update yet, so the learning rate is not the cause: check the initial weights and samples {samples}"
        return f"Lower optim.lr, or {older}"


def _of(ranks: Sequence[int]) -> str:
    return f" of {shown_ranks(ranks)}" if ranks else ""


def shown_ranks(ranks: Sequence[int]) -> str:
    """Returns text such as `rank 1` or `ranks 1, 2 and 5`.

    For many ranks, the text names the first few and gives the number of the others.
    """
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > SHOWN_TENSORS:
        return f"ranks {some_of(ranks, SHOWN_TENSORS)}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def find_origin(finite_loss: bool, saw: Sequence[RankSightings]) -> Origin:
    """Finds out where the non-finite value began, from the findings of all ranks in the repeated step.

    finite_loss: whether the loss of the skipped step was finite.
    """
    what = "non-finite gradient" if finite_loss else "non-finite loss"
    broken = [each for each in saw if each.weights]
    if broken:
        names = sorted({name for each in broken for name in each.weights})[:SHOWN_TENSORS]
        return Origin(what, "forward", "", tuple(each.rank for each in broken), False, tuple(names))
    orders: tuple[tuple[str, Callable[[Iterable[Sighting]], Sighting]], ...] = (("forward", min), ("backward", max))
    for phase, first in orders:
        seen = {each.rank: at for each in saw if (at := getattr(each, phase)) is not None}
        if seen:
            at = first(seen.values())
            ranks = tuple(rank for rank, mine in seen.items() if mine == at)
            clean = {each.replica for each in saw} - {
                each.replica
                for each in saw
                if each.rank in ranks or (each.rank in seen and not seen[each.rank].catching)
            }
            everywhere = not clean and len(ranks) > 1
            return Origin(what, phase, at.name, () if everywhere else ranks, bool(clean), ())
    ranks = tuple(each.rank for each in saw if each.loss is False)
    names = sorted({name for each in saw for name in each.gradients})
    where = f"the gradient of {', '.join(names[:SHOWN_TENSORS])}" if finite_loss and names else ""
    return Origin(what, None, where, ranks, False, ())
