"""Where values that are not finite began: on which rank, in which layer, in the forward or the backward pass.

The loss and the gradients of a step are sums over ranks, in which one NaN hides where it came from. So a step that was skipped
is done once more, with the same weights and data, while every module is watched; its gradients are thrown away. A normal
step pays nothing. What is seen is gathered from all ranks, and the earliest sighting in the order of the pass is the origin:

    forward     the smallest place in the order of the layers
    backward    the largest one, if the forward pass was finite everywhere

Later layers, earlier ranks of the pipeline and the experts' ranks only catch what began there. A value that does not come
again was no matter of the weights or the data, but most likely of a device.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from conf.words import some_of
from train.loop.pass_watch import PassWatch, PlainSightings, Sighting
from train.model.deepseek import DeepSeekV3

SHOWN_TENSORS = 8
"""Names in a sentence, at most."""


@dataclass(frozen=True)
class RankSightings(PlainSightings):
    """What one rank knows of a step that was skipped."""

    rank: int
    replica: int
    """The data-parallel rank: ranks with the same one work on the same samples."""
    loss: bool | None
    """Whether its own loss was finite; None on a rank that sees no loss."""
    gradients: list[str]
    """Parameters of its shard with a non-finite gradient, which is summed over ranks; the first SHOWN_TENSORS."""
    weights: list[str]
    """Parameters that are not finite themselves."""
    forward: Sighting | None
    backward: Sighting | None


class Watch(PassWatch):
    """Looks for values that are not finite."""

    def __init__(self, chunks: Sequence[DeepSeekV3]):
        super().__init__(chunks)
        self.forward: Sighting | None = None
        """The first in the order of the layers."""
        self.backward: Sighting | None = None
        """The last in the order of the layers, which the backward pass reaches first."""

    def watch(self, name: str, module: nn.Module, start: Sighting, end: Sighting) -> None:
        super().watch(name, module, start, end)
        for part, param in module.named_parameters(recurse=False):
            if param.requires_grad:
                at = Sighting(start.layer, start.boundary, f"the weight {name}.{part}", catching=True)
                self.handles.append(param.register_hook(partial(self._see_weights_gradient, at, param)))

    def see_value(self, at: Sighting, value: Tensor) -> None:
        if (self.forward is None or at < self.forward) and not is_finite(value):
            self.forward = at

    def see_gradient(self, at: Sighting, gradient: Tensor) -> None:
        if (self.backward is None or at > self.backward) and not is_finite(gradient):
            self.backward = at

    def _see_weights_gradient(self, at: Sighting, param: nn.Parameter, gradient: Tensor | None) -> None:
        """Where autograd has none the product has added it to the sum: not finite once, not finite from there on."""
        gradient = param.grad if gradient is None else gradient
        if gradient is not None:
            self.see_gradient(at, gradient)


def is_finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())


def bad_weights(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the parameters with a value that is not finite."""
    return sorted({name for name, weight in named if not is_finite(weight)})[:SHOWN_TENSORS]


@dataclass(frozen=True)
class Origin:
    """Where a value that is not finite began, as far as that can be known."""

    what: str
    """`non-finite loss` or `non-finite gradient`."""
    phase: str | None
    """forward, backward; None where it did not come again."""
    where: str
    ranks: tuple[int, ...]
    """Empty where no rank can be told from the others."""
    alone: bool
    """Other replicas with the same weights were finite."""
    weights: tuple[str, ...]

    @property
    def text(self) -> str:
        """One sentence without a full stop."""
        whom = f" on {shown_ranks(self.ranks)}" if self.ranks else ""
        if self.weights:
            return f"{self.what}: weights are not finite{whom}: {', '.join(self.weights)}"
        if self.phase is None:
            seen = f"{self.where}{whom}" if self.where else f"the loss{whom}" if whom else "it"
            return f"{self.what}: {seen} was not finite, and was finite when the same step was done again"
        place = self.where if self.phase == "forward" else f"the gradient of {self.where}"
        return f"{self.what}: it began in the {self.phase} pass{whom or ' on all ranks that hold it'}, at {place}"

    def advice(self, updates: int, samples: str) -> str:
        """What fits. updates: how many were made to the weights so far. samples: those of the step, for a person."""
        older = "resume from an older checkpoint with resume=PATH"
        if self.weights:
            if updates:
                return f"The weights themselves are broken, by a file, a memory or an update: {older}"
            return "The weights that it starts from are broken: look at init_from, and at the memory of the device"
        if self.phase is None:
            return f"Neither weights nor data do that: test the device and its memory{_of(self.ranks)}, and start the same command"
        if self.alone:
            return (
                f"Other ranks were finite with the same weights, so that the rate is not to blame: look at samples {samples} "
                f"of the data, and at the device{_of(self.ranks)}"
            )
        if not updates:
            return f"No update was made yet, so that the rate is not to blame: look at the weights that it starts from and at samples {samples}"
        return f"Lower optim.lr, or {older}"


def _of(ranks: Sequence[int]) -> str:
    return f" of {shown_ranks(ranks)}" if ranks else ""


def shown_ranks(ranks: Sequence[int]) -> str:
    """`rank 1`, `ranks 1, 2 and 5`, or the first few and how many more."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > SHOWN_TENSORS:
        return f"ranks {some_of(ranks, SHOWN_TENSORS)}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def find_origin(finite_loss: bool, saw: Sequence[RankSightings]) -> Origin:
    """From what all ranks saw when the step was done again. finite_loss: whether the loss of the step was."""
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
