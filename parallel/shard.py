"""The one shape in which state leaves and enters a rank: an interval of a flattened logical tensor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


@dataclass
class Shard:
    """Elements [offset, offset + local.numel()) of the flattened logical tensor of `shape`.

    ZeRO fragments, a rank's experts and whole tensors are all shards, so a checkpoint written under one layout
    is read under any other by intersecting intervals.
    """

    local: Tensor
    """1-D, contiguous; shares memory with the live state, so that loading fills it in place."""
    offset: int
    """First element, in elements of the flattened logical tensor."""
    shape: tuple[int, ...]
    """Shape of the logical tensor over all ranks."""

    def __post_init__(self) -> None:
        assert self.local.dim() == 1 and self.local.is_contiguous()
        assert self.offset >= 0 and self.offset + self.local.numel() <= math.prod(self.shape)


@dataclass
class Fragment:
    """What this rank updates of one parameter: elements [offset, offset + master.numel()) of it, flattened.

    The parameter is the rank's own, so experts count from the rank's first expert.
    """

    param: nn.Parameter
    offset: int
    master: Tensor
    """fp32, 1-D; shares memory with the live state, as the optimizer's state does."""
    state: dict[str, Tensor]
    """The optimizer's, by the names of its rule (conf/optimizers.py)."""


class Sharing(NamedTuple):
    """How many ranks hold the same weights, and which of them this rank is."""

    ranks: int
    rank: int


class ShardSlice(NamedTuple):
    """The elements of a parameter that lie in this rank's shard of its group."""

    param: nn.Parameter
    offset: int
    """First element, in the flattened parameter."""
    place: slice
    """In the shard."""


@dataclass
class GradientHandover:
    """What ZeRO hands to the optimizer for its next update, beside the `.grad` of the flat parameters. The one object that both
    know; ZeRO fills it and the optimizer reads it.
    """

    slices: dict[Tensor, list[ShardSlice]] = field(default_factory=dict)
    """By flat parameter what lies in it of which weights, for an update that needs more than single elements; at stages 1 and 2."""
    factor: Tensor | None = None
    """All gradients are multiplied with it on their way into the update, which so clips them; a scalar on the host."""
    unreduced: dict[Tensor, list[Tensor]] = field(default_factory=dict)
    """By flat parameter the gradients of one that no other rank shares, where they lie: 1-D, fp32, one after another from its
    first element on, none for padding at its end. Its `.grad` is a stand-in."""
    divisor: int = 1
    """Those are sums over so many ranks' data, of which the mean is wanted."""

    def of(self, param: Tensor) -> tuple[list[Tensor], Tensor | float | None]:
        """The gradient of a flat parameter in pieces, and what to multiply them with."""
        if param not in self.unreduced:
            assert param.grad is not None
            return [param.grad.view(-1)], self.factor
        if self.divisor == 1:
            return self.unreduced[param], self.factor
        return self.unreduced[param], (1.0 if self.factor is None else self.factor) / self.divisor


def whole(tensor: Tensor) -> Shard:
    """The shard of a rank that holds all of a tensor."""
    return Shard(tensor.detach().view(-1), 0, tuple(tensor.shape))


class ShardedOptimizer(Protocol):
    """What updates the flat fp32 parameters that ZeRO hands over, and so what parallel/zero asks of an optimizer. It is a
    torch.optim.Optimizer; every group has the rule of its weights as `rule` (conf/optimizers.py).
    """

    param_groups: list[dict[str, Any]]
    handover: GradientHandover
    updates: int
    """Made before this step; the owner advances it, once per step."""

    def allocate(self, param: Tensor) -> dict[str, Tensor]:
        """The state of a flat parameter by name, made on first use; each of its shape, so that it is cut where the parameter is."""
        ...

    def sums_of_squares(self, pieces: Sequence[Tensor]) -> Tensor:
        """The sum of squares of every flat fp32 tensor, in fp64: (pieces,)."""
        ...

    def step(self, closure: None = None) -> None:
        """One update of every group that has gradients."""
        ...
